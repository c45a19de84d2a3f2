//! Values of options, checked when they are parsed.

use std::str::FromStr;

/// A Kubernetes quantity such as `8`, `500m` or `100Gi`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantity(pub String);

impl FromStr for Quantity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let suffix = &text[digits.len()..];
        let number = digits.parse::<f64>().is_ok_and(|number| number > 0.0 && number.is_finite());
        let plain = digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let known = ["", "m", "k", "M", "G", "T", "P", "Ki", "Mi", "Gi", "Ti", "Pi"].contains(&suffix);
        if number && plain && known {
            return Ok(Self(text.to_owned()));
        }
        Err("expected a quantity such as 8, 500m or 100Gi".into())
    }
}

/// `KEY=VALUE`: a label or an environment variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Text before the first `=`.
    pub key: String,
    /// Text after the first `=`.
    pub value: String,
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(Self { key: key.into(), value: value.into() }),
            _ => Err("expected KEY=VALUE".into()),
        }
    }
}

/// `KEY[=VALUE][:EFFECT]`, the syntax of `kubectl taint`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toleration {
    /// Key of the taint.
    pub key: String,
    /// Value of the taint; `None` matches any.
    pub value: Option<String>,
    /// Effect of the taint; `None` matches any.
    pub effect: Option<String>,
}

impl FromStr for Toleration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (taint, effect) =
            text.split_once(':').map_or((text, None), |(taint, effect)| (taint, Some(effect)));
        if effect.is_some_and(|effect| !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect)) {
            return Err("expected the effect NoSchedule, PreferNoSchedule or NoExecute".into());
        }
        let (key, value) = taint.split_once('=').map_or((taint, None), |(key, value)| (key, Some(value)));
        if key.is_empty() {
            return Err("expected KEY[=VALUE][:EFFECT]".into());
        }
        Ok(Self { key: key.into(), value: value.map(Into::into), effect: effect.map(Into::into) })
    }
}

/// `KEY=required|preferred`: a topology that pods spread over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spread {
    /// Node label that names the topology domain.
    pub key: String,
    /// Whether a pod waits if it would make the spread uneven.
    pub required: bool,
}

impl FromStr for Spread {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, "required")) if !key.is_empty() => Ok(Self { key: key.into(), required: true }),
            Some((key, "preferred")) if !key.is_empty() => Ok(Self { key: key.into(), required: false }),
            _ => Err("expected KEY=required or KEY=preferred, e.g. kubernetes.io/hostname=required".into()),
        }
    }
}

/// `RESOURCE[=N]`: devices of a device plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rdma {
    /// Name of the resource.
    pub resource: String,
    /// Number of devices.
    pub count: u32,
}

impl FromStr for Rdma {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (resource, count) = text.split_once('=').unwrap_or((text, "1"));
        let count = count.parse().ok().filter(|count| *count > 0);
        match count {
            Some(count) if resource.contains('/') => Ok(Self { resource: resource.into(), count }),
            _ => Err("expected RESOURCE[=N], e.g. rdma/hca_shared_devices_a=1".into()),
        }
    }
}

/// Where files are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileStore {
    /// A claim that belongs to the run.
    New(Quantity),
    /// An existing claim, and a folder in it.
    Claim(String, Option<String>),
    /// An existing ConfigMap.
    ConfigMap(String),
    /// A Google Cloud Storage bucket, and a folder in it, through GKE's FUSE driver.
    Gcs(String, Option<String>),
    /// Scratch space of the pod.
    Scratch(Quantity),
}

impl FromStr for FileStore {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let folder = |rest: &str| match rest.split_once('/') {
            Some((name, folder)) => (name.to_owned(), Some(folder.trim_matches('/').to_owned())),
            None => (rest.to_owned(), None),
        };
        let (kind, rest) = text.split_once(':').unwrap_or(("", text));
        match (kind, rest) {
            (_, "") => Err("nothing follows the colon".into()),
            ("new", size) => size.parse().map(Self::New),
            ("scratch", size) => size.parse().map(Self::Scratch),
            ("claim", rest) => {
                let (name, folder) = folder(rest);
                Ok(Self::Claim(name, folder))
            }
            ("configmap", name) => Ok(Self::ConfigMap(name.to_owned())),
            ("nfs" | "host", _) => Err("the pod security standard `restricted` allows no such volume in a pod; make a \
PersistentVolume of it and give its claim: claim:NAME"
                .into()),
            ("gs", rest) => {
                let (bucket, folder) = folder(rest.trim_start_matches('/'));
                if bucket.is_empty() { Err("expected gs://BUCKET[/FOLDER]".into()) } else { Ok(Self::Gcs(bucket, folder)) }
            }
            ("s3", _) => Err("checkpoints are completed by renaming their folder, which no driver for S3 can do; use a claim \
of a shared file system, and copy finished checkpoints to the bucket from there"
                .into()),
            _ => Err("expected new:SIZE, claim:NAME[/FOLDER], configmap:NAME, gs://BUCKET[/FOLDER] or \
scratch:SIZE"
                .into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_kubernetes_suffixes() {
        for good in ["8", "500m", "100Gi", "1.5Ti", "20k"] {
            assert_eq!(good.parse(), Ok(Quantity(good.into())));
        }
        for bad in ["", "Gi", "-1Gi", "1 Gi", "12GB", "1e3", "0", "inf", "NaN", "ü"] {
            assert!(bad.parse::<Quantity>().is_err(), "{bad}");
        }
    }

    #[test]
    fn places_name_a_kind() {
        let place = |text: &str| text.parse::<FileStore>();
        assert_eq!(place("new:10Gi"), Ok(FileStore::New(Quantity("10Gi".into()))));
        assert_eq!(place("claim:runs"), Ok(FileStore::Claim("runs".into(), None)));
        assert_eq!(place("claim:runs/a/b/"), Ok(FileStore::Claim("runs".into(), Some("a/b".into()))));
        assert!(place("nfs:files.local:/export").unwrap_err().contains("PersistentVolume"));
        assert_eq!(place("gs://bucket/runs"), Ok(FileStore::Gcs("bucket".into(), Some("runs".into()))));
        assert!(place("s3://bucket/runs").unwrap_err().contains("renaming"));
        for bad in ["", "runs", "claim:", "gs://", "new:much", "host:/data"] {
            assert!(place(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tolerations_have_the_syntax_of_kubectl_taint() {
        let toleration: Toleration = "dedicated=training:NoSchedule".parse().unwrap();
        assert_eq!((toleration.key.as_str(), toleration.value.as_deref()), ("dedicated", Some("training")));
        assert_eq!(toleration.effect.as_deref(), Some("NoSchedule"));
        assert!(
            "dedicated:Sometimes".parse::<Toleration>().is_err()
                && ":NoSchedule".parse::<Toleration>().is_err()
        );
        assert_eq!("rdma/hca".parse(), Ok(Rdma { resource: "rdma/hca".into(), count: 1 }));
        assert!("rdma/hca=0".parse::<Rdma>().is_err() && "hca".parse::<Rdma>().is_err());
        assert!("kubernetes.io/hostname=sometimes".parse::<Spread>().is_err());
    }
}
