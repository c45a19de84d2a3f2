//! Compiles the .proto files with protox, so that no system `protoc` is needed.

/// Messages that make up a run event; they get serde derives.
const EVENTS: [&str; 18] = [
    "RunEvent",
    "RunEvent.body",
    "RunStarted",
    "TrainerArrived",
    "TrainerJoined",
    "DataReport",
    "StepMetrics",
    "EvaluationMetrics",
    "CheckpointReport",
    "RunEnded",
    "Failure",
    "Failure.process",
    "PhaseChanged",
    "ModelReport",
    "ReferenceProgress",
    "EarlyStopping",
    "Beat",
    "Skipped",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["dyad/v1/dyad.proto"], ["proto"])?;
    // `--print-events` writes events as JSON lines; in a pod that is the only way out.
    let json = "#[derive(serde::Serialize, serde::Deserialize)] #[serde(rename_all = \"snake_case\")]";
    let mut build = tonic_prost_build::configure();
    for message in EVENTS {
        build = build.type_attribute(format!("dyad.v1.{message}"), json);
    }
    build.compile_fds(descriptors)?;
    Ok(())
}
