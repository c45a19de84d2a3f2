//! Reads from OpenTelemetry's environment variables whether traces are wanted. Pure.

/// Tracing as the environment asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Tracing {
    /// No traces.
    Off,
    /// Traces, to this endpoint.
    On { endpoint: String },
    /// Traces in a way that this build does not support; holds the reason.
    Refused(String),
}

/// Reads the environment through `get`. An empty variable counts as unset, as the specification says.
pub(crate) fn decide(get: &dyn Fn(&str) -> Option<String>) -> Tracing {
    let get = |name: &str| get(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    let first = |names: [&str; 2]| names.into_iter().find_map(&get);
    if get("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return Tracing::Off;
    }
    if get("OTEL_TRACES_EXPORTER").is_some_and(|value| value.eq_ignore_ascii_case("none")) {
        return Tracing::Off;
    }
    let endpoints = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
    let Some(endpoint) = first(endpoints) else { return Tracing::Off };
    let protocols = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
    match first(protocols) {
        Some(protocol) if protocol != "grpc" => Tracing::Refused(format!(
            "OTLP over {protocol} is asked for, this build speaks grpc (port 4317 of most collectors)"
        )),
        _ if endpoint.starts_with("https:") => Tracing::Refused(format!(
            "{endpoint} asks for TLS, this build speaks plain gRPC; send to a collector on this host or in this cluster"
        )),
        _ => Tracing::On { endpoint },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> Tracing {
        decide(&|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn traces_are_off_unless_an_endpoint_is_named() {
        let general = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:4317");
        let on = |endpoint: &str| Tracing::On { endpoint: endpoint.into() };
        assert_eq!(with(&[]), Tracing::Off);
        assert_eq!(with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]), Tracing::Off);
        assert_eq!(with(&[general]), on("http://a:4317"));
        assert_eq!(with(&[general, ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://b:1")]), on("http://b:1"));
        assert_eq!(with(&[general, ("OTEL_SDK_DISABLED", "TRUE")]), Tracing::Off);
        assert_eq!(with(&[general, ("OTEL_TRACES_EXPORTER", "none")]), Tracing::Off);
    }

    #[test]
    fn unsupported_protocols_are_named() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:4318");
        let Tracing::Refused(reason) = with(&[endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")])
        else {
            panic!("not refused")
        };
        assert!(reason.contains("http/protobuf") && reason.contains("4317"), "{reason}");
        assert!(matches!(with(&[endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]), Tracing::On { .. }));
        let encrypted = with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "https://a:4317")]);
        assert!(matches!(encrypted, Tracing::Refused(reason) if reason.contains("TLS")));
    }
}
