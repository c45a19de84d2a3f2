//! The files of a crate import each other without cycles, so that each can be read without the files above it.
#![allow(clippy::unwrap_used, reason = "a test that cannot read the sources has failed")]

use dyad_tests::imports::Imports;
use dyad_tests::root;

/// All crates except the tests.
const LAYERED: [&str; 11] = [
    "proto",
    "proto/sources",
    "proto/telemetry",
    "coordinator",
    "launcher",
    "launcher/inspect",
    "trainer",
    "trainer/data",
    "trainer/families",
    "trainer/torch",
    "trainer/torch/testing",
];

#[test]
fn files_import_each_other_without_cycles() {
    for name in LAYERED {
        let imports = Imports::read(&root().join(name).join("src")).unwrap();
        let counted: usize = imports.edges.values().map(std::collections::BTreeSet::len).sum();
        assert!(counted >= imports.edges.len() / 2, "{name}: only {counted} imports were found");
        assert!(imports.circles().is_empty(), "{name}: {:#?}", imports.circles());
    }
}
