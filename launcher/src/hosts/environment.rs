//! Environment variables that the launcher passes to every process of the run; ssh passes none by itself. Pure.

use dyad_proto::Fault;

/// Variables to pass on, by name and by prefix: those that tune or observe a run, none that belong to one machine.
const NAMES: [&str; 5] = ["DYAD_LOG", "TRACEPARENT", "TRACESTATE", "MALLOC_CONF", "TRANSFORMERS_OFFLINE"];
const FAMILIES: [&str; 5] = ["OTEL_", "NCCL_", "GLOO_", "HF_", "HUGGING"];

/// Variables to set. `wanted` are those of `--env` and override inherited ones; without a value they take the launcher's.
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

/// Whether this is a valid variable name.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.bytes().next().is_some_and(|first| !first.is_ascii_digit()) && text.bytes().all(good)
}

/// The launcher's own environment, without variables that are not UTF-8.
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
    fn tuning_variables_are_passed_on_and_secrets_are_not() {
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
