//! `deploy/observability/tempo/tempo.yaml` against the keys that Tempo 2.9 and 3 accept. No Tempo runs here:
//! `tests/observability/tempo-keys.json` lists the keys from both sources.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use dyad_tests::root;
use serde_json::{Value, json};

fn read(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap()
}

/// Returns the keys of a configuration that a version does not know, with their paths.
fn unknown(known: &Value, version: &str, at: &str, config: &Value) -> Vec<String> {
    if known["free"].as_array().unwrap().iter().any(|free| free == at) {
        return Vec::new();
    }
    let Some(config) = config.as_object() else { return Vec::new() };
    let keys = known["versions"][version][at].as_array();
    let below = config.iter().map(|(key, value)| {
        let place = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
        match keys.is_some_and(|keys| keys.iter().any(|known| known == key)) {
            true => unknown(known, version, &place, value),
            false => vec![place],
        }
    });
    below.flatten().collect()
}

#[test]
fn tempo_2_9_and_3_know_every_key_and_keep_traces_for_two_weeks() {
    let known: Value = serde_json::from_str(&read("tests/observability/tempo-keys.json")).unwrap();
    let config: Value = serde_saphyr::from_str(&read("deploy/observability/tempo/tempo.yaml")).unwrap();
    for version in ["2.9.0", "3.0.3"] {
        assert_eq!(unknown(&known, version, "", &config), Vec::<String>::new(), "{version}");
    }
    assert_eq!(config["overrides"]["defaults"]["compaction"]["block_retention"], "336h");
    // An earlier form of the file, which 3 refuses, and a key that neither version knows.
    let old = json!({ "compactor": { "compaction": { "block_retention": "336h" } } });
    assert!(unknown(&known, "2.9.0", "", &old).is_empty());
    assert_eq!(unknown(&known, "3.0.3", "", &old), ["compactor"]);
    let wrong = json!({ "storage": { "trace": { "wall": {} } } });
    assert_eq!(unknown(&known, "2.9.0", "", &wrong), ["storage.trace.wall"]);
}

/// Both deployments name Tempo 2.9.0, one of these versions.
#[test]
fn the_deployed_tempo_version_is_a_checked_one() {
    for file in ["compose.yaml", "kubernetes/tempo.yaml"] {
        let text = read(&format!("deploy/observability/{file}"));
        let image = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("image: grafana/tempo:"))
            .or_else(|| text.lines().find_map(|line| line.trim().strip_prefix("- image: grafana/tempo:")));
        let version = image.unwrap().trim_start_matches("${TEMPO_VERSION:-").trim_end_matches('}');
        assert_eq!(version, "2.9.0", "{file}");
    }
}
