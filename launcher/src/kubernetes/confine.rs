//! What the pod security standard `restricted` asks for, and a root file system that nobody can write.

use k8s_openapi::api::core::v1::{Capabilities, PodSecurityContext, SeccompProfile, SecurityContext};

/// User and group of the image.
pub const USER: i64 = 65532;

/// Of a pod.
#[must_use]
pub fn pod() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        // New volumes become the group's; a volume that is so already is not walked through.
        fs_group: Some(USER),
        fs_group_change_policy: Some("OnRootMismatch".into()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None }),
        ..Default::default()
    }
}

/// Of a container. RDMA pins memory, for which it needs a capability that `restricted` and `baseline` refuse.
#[must_use]
pub fn container(rdma: bool) -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities {
            drop: Some(vec!["ALL".into()]),
            add: rdma.then(|| vec!["IPC_LOCK".into()]),
        }),
        ..Default::default()
    }
}
