//! The model families that can be trained.

use dyad_proto::Fault;

use dyad_families::ModelConfig;

use super::layer::Family;
use super::{llama, qwen2};

/// All families.
const FAMILIES: &[Family] = &[llama::FAMILY, qwen2::FAMILY];

/// Returns the family of a model; fails if it is not supported.
pub(super) fn of(config: &ModelConfig) -> Result<&'static Family, Fault> {
    FAMILIES.iter().find(|family| family.model_type == config.model_type).ok_or_else(|| {
        let names: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
        Fault::input(format!("model_type \"{}\" is not supported", config.model_type))
            .hint(format!("supported: {}", names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_whose_configuration_is_read_can_be_loaded() {
        let names: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
        assert_eq!(names, dyad_families::names());
    }
}
