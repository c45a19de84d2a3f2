//! Security contexts for the pod security standard `restricted`, with a read-only root file system.

use k8s_openapi::api::core::v1::{Capabilities, PodSecurityContext, SeccompProfile, SecurityContext};

/// User and group id of the image.
pub const USER: i64 = 65532;

/// Security context of a pod.
#[must_use]
pub fn pod() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        // Kubernetes gives volumes to this group. OnRootMismatch skips the slow walk if the volume's root has the group already.
        fs_group: Some(USER),
        fs_group_change_policy: Some("OnRootMismatch".into()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None }),
        ..Default::default()
    }
}

/// Security context of a container. RDMA pins memory and so needs `IPC_LOCK`, which `restricted` and `baseline` forbid.
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
