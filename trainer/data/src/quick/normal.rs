//! Normalisers: SentencePiece's spaces as string operations, Unicode forms not at all on ASCII, all else by the crate.

use std::borrow::Cow;

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::{NormalizedString, Normalizer};

/// What a normaliser does, as far as it is known.
#[derive(Debug)]
pub(super) struct Normal {
    /// `None`: only the crate knows.
    steps: Option<Vec<NormalStep>>,
}

#[derive(Debug)]
enum NormalStep {
    /// ASCII has neither composed letters nor compatibility forms.
    UnicodeForm,
    Prepend(String),
    /// Spaces become this.
    Spaces(String),
}

impl Normal {
    pub(super) fn of(normalizer: Option<&NormalizerWrapper>) -> Self {
        let mut found = Vec::new();
        let known = normalizer.is_none_or(|normalizer| steps(normalizer, &mut found).is_some());
        Self { steps: known.then_some(found) }
    }

    /// Whether every text stays as it is.
    pub(super) fn is_identity(&self) -> bool {
        self.steps.as_ref().is_some_and(Vec::is_empty)
    }

    /// Whether what it does is known, and leaves the start of a text its start.
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
                // The plain pipeline goes on with what it has, too.
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
