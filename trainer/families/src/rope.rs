//! Settings of rotary positions: two spellings, read with transformers' order of precedence.

use std::ops::RangeInclusive;

use dyad_proto::Fault;
use serde_json::Value;

use super::fields::Fields;

/// Scaling of the rotation frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// `inv_freq[i] = theta^(-2i/d)`.
    Default,
    /// Positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by a factor, short ones kept, a blend between.
    Llama3 {
        /// Divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: f64,
    },
}

pub(super) struct Rope {
    pub(super) theta: f64,
    pub(super) scaling: RopeScaling,
}

/// transformers' default base.
const THETA: f64 = 10_000.0;
/// Limits far beyond the values of real models.
const THETAS: RangeInclusive<f64> = 1.0..=1e15;
const FACTORS: RangeInclusive<f64> = 1e-3..=1e6;
const LENGTHS: RangeInclusive<f64> = 1.0..=1e12;
const LLAMA3: [&str; 4] =
    ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"];

/// Reads `rope_parameters`, or `rope_scaling` and `rope_theta`.
pub(super) fn read(
    fields: Fields<'_>,
    max_position_embeddings: i64,
    warnings: &mut Vec<String>,
) -> Result<Rope, Fault> {
    let old = fields.object("rope_scaling")?.filter(|old| !old.0.is_empty());
    let new = fields.object("rope_parameters")?;
    if let (Some(old), Some(new)) = (old, new)
        && old.0 != new.0
    {
        warnings
            .push("rope_scaling and rope_parameters differ: rope_scaling counts, as in transformers".into());
    }
    let nothing = serde_json::Map::new();
    let rope = old.or(new).unwrap_or(Fields(&nothing));
    let theta = theta(fields, rope, warnings)?;
    let kind = match rope.0.get("rope_type").or_else(|| rope.0.get("type")) {
        None => "default",
        Some(Value::String(kind)) => kind,
        Some(other) => return Err(unsupported(&other.to_string())),
    };
    let (scaling, read): (RopeScaling, &[&str]) = match kind {
        "default" => (RopeScaling::Default, &[]),
        "linear" => (RopeScaling::Linear { factor: needed(rope, kind, "factor")? }, &["factor"]),
        "llama3" => (llama3(fields, rope, max_position_embeddings)?, &LLAMA3),
        other => return Err(unsupported(other)),
    };
    check_others(rope, kind, read, warnings)?;
    Ok(Rope { theta, scaling })
}

fn unsupported(kind: &str) -> Fault {
    Fault::input(format!("rope scaling \"{kind}\" is not supported"))
        .hint("supported: default, linear, llama3")
}

fn theta(fields: Fields<'_>, rope: Fields<'_>, warnings: &mut Vec<String>) -> Result<f64, Fault> {
    if fields.is_null("rope_theta") || rope.is_null("rope_theta") {
        return Err(Fault::input("rope_theta is null").hint("remove it for transformers' default of 10000"));
    }
    let (inner, outer) = (rope.within("rope_theta", THETAS)?, fields.within("rope_theta", THETAS)?);
    if let (Some(inner), Some(outer)) = (inner, outer)
        && inner != outer
    {
        warnings.push(format!(
            "rope_theta is {outer}, but {inner} in the rope scaling: {inner} counts, as in transformers"
        ));
    }
    Ok(inner.or(outer).unwrap_or(THETA))
}

fn needed(rope: Fields<'_>, kind: &str, name: &str) -> Result<f64, Fault> {
    rope.within(name, FACTORS)?.ok_or_else(|| {
        Fault::input(format!("rope scaling \"{kind}\": no number `{name}`"))
            .hint("config.json is damaged, or not of this model")
    })
}

fn llama3(fields: Fields<'_>, rope: Fields<'_>, max_position_embeddings: i64) -> Result<RopeScaling, Fault> {
    let original = "original_max_position_embeddings";
    // As in transformers, a value outside the scaling object takes precedence.
    let original = match (fields.within(original, LENGTHS)?, rope.within(original, LENGTHS)?) {
        (Some(length), _) | (None, Some(length)) => length,
        (None, None) => max_position_embeddings as f64,
    };
    let (low, high) =
        (needed(rope, "llama3", "low_freq_factor")?, needed(rope, "llama3", "high_freq_factor")?);
    if high <= low {
        return Err(Fault::input(format!(
            "rope scaling \"llama3\": high_freq_factor {high} is not above low_freq_factor {low}"
        ))
        .hint("config.json is damaged, or not of this model"));
    }
    Ok(RopeScaling::Llama3 {
        factor: needed(rope, "llama3", "factor")?,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    })
}

/// Checks the fields that this kind of scaling does not read. Refuses those that rotate part of a head or differ by layer; transformers
/// ignores the others, so they only get a warning.
fn check_others(
    rope: Fields<'_>,
    kind: &str,
    read: &[&str],
    warnings: &mut Vec<String>,
) -> Result<(), Fault> {
    let mut ignored = Vec::new();
    for (name, value) in rope.0.iter().filter(|(_, value)| !value.is_null()) {
        match name.as_str() {
            "rope_type" | "type" | "rope_theta" => {}
            "partial_rotary_factor" if value.as_f64() == Some(1.0) => {}
            "partial_rotary_factor" | "mrope_section" => {
                return Err(Fault::input(format!("rope scaling: {name} = {value} is not supported"))
                    .hint("rotary positions are supported over whole heads, one position a token"));
            }
            _ if value.is_object() => {
                return Err(Fault::input(format!("rope scaling by layer ({name}) is not supported"))
                    .hint("all layers must share their rotary positions"));
            }
            name if !read.contains(&name) => ignored.push(name),
            _ => {}
        }
    }
    if !ignored.is_empty() {
        warnings.push(format!("rope scaling \"{kind}\" does not read {}", ignored.join(", ")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(json: &str) -> Result<(f64, RopeScaling, usize), Fault> {
        let json = serde_json::from_str(json).unwrap();
        let mut warnings = Vec::new();
        let rope = read(Fields(&json), 256, &mut warnings)?;
        Ok((rope.theta, rope.scaling, warnings.len()))
    }

    #[test]
    fn both_spellings_of_llama3_mean_the_same() {
        let parameters = r#""rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0"#;
        let new = rope(&format!(r#"{{"rope_parameters":{{{parameters},"rope_theta":500000.0}}}}"#)).unwrap();
        let old = rope(&format!(r#"{{"rope_scaling":{{{parameters}}},"rope_theta":500000.0}}"#)).unwrap();
        assert_eq!(new, old);
        assert!(matches!(old.1, RopeScaling::Llama3 { original_max_position_embeddings: 256.0, .. }));
        let beside = format!(
            r#"{{"rope_scaling":{{{parameters},"original_max_position_embeddings":64}},"original_max_position_embeddings":32}}"#
        );
        assert!(matches!(
            rope(&beside).unwrap().1,
            RopeScaling::Llama3 { original_max_position_embeddings: 32.0, .. }
        ));
    }

    #[test]
    fn rope_scaling_wins_over_rope_parameters() {
        let both = r#"{"rope_parameters":{"rope_type":"default","rope_theta":500000.0},
            "rope_scaling":{"type":"linear","factor":2.0},"rope_theta":20000.0}"#;
        assert_eq!(rope(both).unwrap(), (20_000.0, RopeScaling::Linear { factor: 2.0 }, 1));
        let empty = r#"{"rope_parameters":{"rope_type":"default","rope_theta":5.0},"rope_scaling":{}}"#;
        assert_eq!(rope(empty).unwrap(), (5.0, RopeScaling::Default, 0));
        let two = r#"{"rope_parameters":{"rope_type":"default","rope_theta":5.0},"rope_theta":7.0}"#;
        assert_eq!(rope(two).unwrap(), (5.0, RopeScaling::Default, 1));
        assert_eq!(
            rope(r#"{"rope_parameters":null,"rope_scaling":null}"#).unwrap(),
            (THETA, RopeScaling::Default, 0)
        );
    }

    #[test]
    fn unsupported_rope_scaling_is_refused_by_name() {
        for (json, message) in [
            (r#"{"rope_scaling":{"rope_type":"yarn","factor":2}}"#, "rope scaling \"yarn\" is not supported"),
            (
                r#"{"rope_scaling":{"type":"dynamic","factor":2}}"#,
                "rope scaling \"dynamic\" is not supported",
            ),
            (r#"{"rope_scaling":{"rope_type":null}}"#, "rope scaling \"null\" is not supported"),
            (r#"{"rope_scaling":{"type":"linear"}}"#, "rope scaling \"linear\": no number `factor`"),
            (r#"{"rope_scaling":{"type":"linear","factor":0}}"#, "factor = 0"),
            (r#"{"rope_scaling":"linear"}"#, "rope_scaling = \"linear\": expected an object"),
            (
                r#"{"rope_parameters":{"partial_rotary_factor":0.5}}"#,
                "rope scaling: partial_rotary_factor = 0.5",
            ),
            (r#"{"rope_parameters":{"full_attention":{"rope_type":"default"}}}"#, "rope scaling by layer"),
            (r#"{"rope_parameters":{"mrope_section":[1,2]}}"#, "rope scaling: mrope_section"),
            (r#"{"rope_theta":null}"#, "rope_theta is null"),
            (r#"{"rope_theta":-1}"#, "rope_theta = -1"),
        ] {
            let fault = rope(json).unwrap_err();
            assert!(fault.message.starts_with(message) && !fault.hint.is_empty(), "{json}: {fault}");
        }
        assert_eq!(rope(r#"{"rope_scaling":{"type":"linear","factor":2,"beta_fast":3}}"#).unwrap().2, 1);
    }
}
