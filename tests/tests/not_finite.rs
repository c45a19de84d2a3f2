//! NaN and infinity: the error or warning names their source, and they are never saved into a model that had none.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;

use dyad_tests::{Workspace, text};
use safetensors::SafeTensors;

const EMBEDDING: &str = "model.embed_tokens.weight";

/// Returns a workspace whose model has embedding rows that no token uses, as many published models do.
fn with_spare_rows(config: &str) -> Workspace {
    let workspace = Workspace::with_model(16, config);
    fs::remove_dir_all(workspace.path("model")).unwrap();
    workspace.new_model("model", &["--pad-vocab-to", "400", "--untied-head"]);
    workspace
}

/// Overwrites the last element of a float32 tensor.
fn put_last(workspace: &Workspace, name: &str, value: f32) {
    let path = workspace.path("model/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = {
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor(name).unwrap().data();
        data.as_ptr() as usize - bytes.as_ptr() as usize + data.len()
    };
    bytes[end - 4..end].copy_from_slice(&value.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn weights_with_nan_are_named_and_an_evaluation_of_them_ends_the_run() {
    let workspace =
        Workspace::with_model(16, "max_steps = 2\nvalidation_file = \"pairs.jsonl\"\nn_evals = 1\n");
    put_last(&workspace, "model.norm.weight", f32::NAN);
    let output = workspace.launch(2, &["--max-restarts", "3"]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!said.contains("restart "), "the same would come again: {said}");
    assert!(said.contains("NaN or infinite numbers are in the weights of"), "{said}");
    assert!(said.contains("model.norm.weight") && said.contains("evaluation after step 0: the"), "{said}");
    assert!(!workspace.path("out/final").exists());
}

#[test]
fn a_nan_loss_is_not_retried() {
    let workspace = Workspace::with_model(16, "max_steps = 2\n");
    put_last(&workspace, "model.norm.weight", f32::NAN);
    let output = workspace.launch(2, &["--max-restarts", "3"]);
    let said = text(&output);
    assert!(output.status.code() == Some(1) && !said.contains("restart "), "{said}");
    assert!(said.contains("step 1: "), "{said}");
}

#[test]
fn nan_in_unused_embedding_rows_is_saved_unchanged() {
    let workspace = with_spare_rows("max_steps = 1\nn_checkpoints = 1\n");
    put_last(&workspace, EMBEDDING, f32::NAN);
    for (method, output_dir) in [("sft", "out-sft"), ("dpo", "out-dpo")] {
        let (method, target) = (format!("training_method={method}"), format!("output_dir={output_dir}"));
        let output = workspace.launch(1, &["--set", &method, "--set", &target]);
        let said = text(&output);
        assert!(output.status.success(), "{said}");
        assert!(said.contains("NaN or infinite numbers are in the weights of"), "{said}");
        assert!(workspace.path(output_dir).join("final/model.safetensors").is_file());
    }
}

#[test]
fn a_model_made_infinite_by_the_last_step_is_not_saved() {
    let workspace = with_spare_rows("max_steps = 1\n");
    // Weight decay multiplies the value by -999; the row is not part of the step's loss and gradients.
    put_last(&workspace, EMBEDDING, 1e38);
    let output = workspace.launch(1, &["--set", "learning_rate=1000", "--set", "weight_decay=1"]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let words = format!("step 1: nothing is saved, as NaN or infinite numbers are in {EMBEDDING}");
    assert!(said.contains(&words) && said.contains("lower learning_rate"), "{said}");
    assert!(!workspace.path("out/final").exists(), "{said}");
}
