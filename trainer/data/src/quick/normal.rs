//! Normalisers: SentencePiece's spaces are string operations, Unicode forms are skipped for ASCII, and the crate does the rest.

use std::borrow::Cow;

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::{NormalizedString, Normalizer};

/// Steps of a normaliser, if all of them are known.
#[derive(Debug)]
pub(super) struct Normal {
    /// `None`: the crate has to normalise.
    steps: Option<Vec<NormalStep>>,
}

#[derive(Debug)]
enum NormalStep {
    /// NFC, NFD, NFKC or NFKD: none of them changes ASCII text.
    UnicodeForm,
    Prepend(String),
    /// Replaces spaces by this text.
    Spaces(String),
}

impl Normal {
    pub(super) fn of(normalizer: Option<&NormalizerWrapper>) -> Self {
        let mut found = Vec::new();
        let known = normalizer.is_none_or(|normalizer| steps(normalizer, &mut found).is_some());
        Self { steps: known.then_some(found) }
    }

    /// Whether normalisation changes no text.
    pub(super) fn is_identity(&self) -> bool {
        self.steps.as_ref().is_some_and(Vec::is_empty)
    }

    /// Whether all steps are known; known steps keep the start of a text at the start.
    pub(super) fn keeps_start(&self) -> bool {
        self.steps.is_some()
    }

    /// Normalises a text that is not empty.
    pub(super) fn apply<'t>(&self, normalizer: Option<&NormalizerWrapper>, text: &'t str) -> Cow<'t, str> {
        let quick = self.steps.as_ref().and_then(|steps| quick(steps, text));
        match (quick, normalizer) {
            (Some(text), _) => text,
            (None, None) => Cow::Borrowed(text),
            (None, Some(normalizer)) => {
                let mut normalized = NormalizedString::from(text);
                // The plain pipeline ignores this error, too.
                let _ = normalizer.normalize(&mut normalized);
                Cow::Owned(normalized.get().to_owned())
            }
        }
    }
}

fn steps(normalizer: &NormalizerWrapper, found: &mut Vec<NormalStep>) -> Option<()> {
    use NormalizerWrapper::{NFC, NFD, NFKC, NFKD, Prepend, Replace, Sequence};
    match normalizer {
        NFC(_) | NFD(_) | NFKC(_) | NFKD(_) => found.push(NormalStep::UnicodeForm),
        Prepend(prepend) => found.push(NormalStep::Prepend(prepend.prepend.clone())),
        Replace(replace) => {
            let json = serde_json::to_value(replace).ok()?;
            (json["pattern"]["String"] == " ")
                .then(|| found.push(NormalStep::Spaces(replace.content.clone())))?;
        }
        Sequence(sequence) => sequence.as_ref().iter().try_for_each(|part| steps(part, found))?,
        _ => return None,
    }
    Some(())
}

fn quick<'t>(steps: &[NormalStep], text: &'t str) -> Option<Cow<'t, str>> {
    let mut text = Cow::Borrowed(text);
    for step in steps {
        match step {
            NormalStep::UnicodeForm if text.is_ascii() => {}
            NormalStep::UnicodeForm => return None,
            NormalStep::Prepend(start) if !text.is_empty() => text.to_mut().insert_str(0, start),
            NormalStep::Prepend(_) => {}
            NormalStep::Spaces(with) if text.contains(' ') => text = text.replace(' ', with).into(),
            NormalStep::Spaces(_) => {}
        }
    }
    Some(text)
}
