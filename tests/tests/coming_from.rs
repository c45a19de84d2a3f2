//! `docs/coming-from.md`: every name in the column of Dyad's names is a key of the configuration.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use dyad_proto::RunConfig;
use dyad_tests::root;

/// Names in backticks that are no keys: values, flags, files and commands have other characters, these do not.
const NO_KEYS: [&str; 3] = ["sigmoid", "ipo", "keep_end"];

#[test]
fn the_names_that_other_options_lead_to_are_keys() {
    let text = std::fs::read_to_string(root().join("docs/coming-from.md")).unwrap();
    let keys = RunConfig::keys();
    let rows = text.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |")?.split_once(" | "));
    let mut names = 0;
    for (_, here) in rows {
        for name in here.split('`').skip(1).step_by(2) {
            let is_word = name.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit());
            if !is_word || NO_KEYS.contains(&name) || here.starts_with("not here") {
                continue;
            }
            // `cpo_alpha=0` and the like are no words; `CPOTrainer` is none either.
            assert!(keys.contains(&name), "docs/coming-from.md: `{name}` is no key ({here})");
            names += 1;
        }
    }
    assert!(names > 60, "{names}");
}
