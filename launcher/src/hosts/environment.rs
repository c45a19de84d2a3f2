//! Which of the launcher's environment every process of the run sees. Over ssh nothing goes by itself. Pure.

use dyad_proto::Fault;

/// Names, and beginnings of names, that are passed on: what tunes or watches a run, and nothing that belongs to one machine.
const NAMES: [&str; 5] = ["DYAD_LOG", "TRACEPARENT", "TRACESTATE", "MALLOC_CONF", "TRANSFORMERS_OFFLINE"];
const FAMILIES: [&str; 5] = ["OTEL_", "NCCL_", "GLOO_", "HF_", "HUGGING"];

/// What to set, in order; a later one counts more.
pub fn chosen(
    wanted: &[(String, Option<String>)],
    here: &[(String, String)],
) -> Result<Vec<(String, String)>, Fault> {
    let allowed =
        |name: &str| NAMES.contains(&name) || FAMILIES.iter().any(|family| name.starts_with(family));
    let mut chosen: Vec<(String, String)> = here.iter().filter(|(name, _)| allowed(name)).cloned().collect();
    for (name, value) in wanted {
        let inherited = || here.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
        let value = value.clone().or_else(inherited).ok_or_else(|| {
            Fault::input(format!("--env {name}: no such variable here"))
                .hint("give its value: --env NAME=VALUE")
        })?;
        chosen.retain(|(known, _)| known != name);
        chosen.push((name.clone(), value));
    }
    Ok(chosen)
}

/// Whether a variable can have that name.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.bytes().next().is_some_and(|first| !first.is_ascii_digit()) && text.bytes().all(good)
}

/// The launcher's own environment, as far as it is text.
#[must_use]
pub fn here() -> Vec<(String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tunes_a_run_goes_with_it_and_secrets_of_the_machine_stay() {
        let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let here = [
            variable("OTEL_EXPORTER_OTLP_ENDPOINT", "http://t:4317"),
            variable("NCCL_DEBUG", "INFO"),
            variable("AWS_SECRET_ACCESS_KEY", "x"),
            variable("CUDA_VISIBLE_DEVICES", "1"),
            variable("HOME", "/home/ann"),
        ];
        let names =
            |chosen: Vec<(String, String)>| chosen.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(chosen(&[], &here).unwrap()), ["OTEL_EXPORTER_OTLP_ENDPOINT", "NCCL_DEBUG"]);
        let wanted = [("NCCL_DEBUG".to_owned(), Some("WARN".to_owned())), ("HOME".to_owned(), None)];
        let chosen = chosen(&wanted, &here).unwrap();
        assert_eq!(chosen[1..], [variable("NCCL_DEBUG", "WARN"), variable("HOME", "/home/ann")]);
        assert!(
            super::chosen(&[("NOPE".to_owned(), None)], &here).unwrap_err().message.contains("--env NOPE")
        );
    }
}
