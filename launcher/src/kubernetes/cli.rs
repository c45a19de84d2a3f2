//! Command line of `launcher kubernetes`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::values::{FileStore, Label, Quantity, Rdma, Spread, Toleration};

/// Run on a Kubernetes cluster.
#[derive(Args, Clone, Debug)]
pub struct KubernetesOptions {
    /// What to do.
    #[command(subcommand)]
    pub command: KubernetesCommand,
}

/// What to do on a cluster.
#[derive(Clone, Debug, Subcommand)]
pub enum KubernetesCommand {
    /// Print the run's objects as YAML; needs no cluster.
    Render(RenderOptions),
    /// Create the run's objects (server-side apply), and follow the run with --wait.
    Apply(ApplyOptions),
    /// Show the run's workload, its pods and its progress.
    Status(StatusOptions),
    /// Print the logs of all pods, each line with its pod.
    Logs(LogsOptions),
    /// Follow the run until it ends; the exit status is the run's.
    Wait(WaitOptions),
    /// Delete the run's objects.
    Delete(DeleteOptions),
}

/// How to reach the cluster.
#[derive(Args, Clone, Debug, Default)]
pub struct ClusterOptions {
    /// Kubeconfig file [default: $KUBECONFIG or ~/.kube/config, else the pod's service account].
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig file [default: its current one].
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
}

/// Which run: its name and namespace.
#[derive(Args, Clone, Debug)]
pub struct RunName {
    /// Name of the run; its objects are called after it.
    #[arg(long, default_value = "dyad", value_name = "NAME")]
    pub name: String,
    /// Namespace [default: the context's].
    #[arg(long, short = 'n', value_name = "NAMESPACE")]
    pub namespace: Option<String>,
}

/// Kind of workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// One JobSet: restarts as a whole, from the last checkpoint. Needs the JobSet controller.
    Jobset,
    /// Two plain Jobs. Needs only Kubernetes itself.
    Job,
}

/// Where certificates and join token come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TlsSource {
    /// New ones, as Secrets of the run.
    Generate,
    /// Existing Secrets NAME-coordinator-tls and NAME-trainer-tls.
    Existing,
    /// None: the processes talk in plain text.
    Off,
}

/// Which objects are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ManifestPart {
    /// Everything.
    All,
    /// Only the Secrets.
    Secrets,
}

/// Options that describe the run.
#[derive(Args, Clone, Debug)]
pub struct RunOptions {
    /// Name and namespace.
    #[command(flatten)]
    pub run: RunName,
    /// Pods that train, one per node.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub nodes: u32,
    /// GPUs of each pod, one trainer process per GPU. 0 trains on the CPU, with one process per pod.
    #[arg(long, value_name = "G", value_parser = clap::value_parser!(u32).range(0..=64))]
    pub gpus_per_node: u32,
    /// Container image, built from deploy/Dockerfile; best by digest.
    #[arg(long, value_name = "IMAGE")]
    pub image: String,
    /// Run configuration (TOML); its paths are paths inside the pods.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Override one key of the configuration; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Kind of workload.
    #[arg(long, value_enum, default_value_t = Workload::Jobset)]
    pub workload: Workload,
    /// Where certificates and join token come from.
    #[arg(long, value_enum, default_value_t = TlsSource::Generate)]
    pub tls: TlsSource,
    /// Storage.
    #[command(flatten)]
    pub storage: StorageOptions,
    /// Resources and placement.
    #[command(flatten)]
    pub scheduling: SchedulingOptions,
    /// Ends and restarts.
    #[command(flatten)]
    pub lifecycle: LifecycleOptions,
    /// Network.
    #[command(flatten)]
    pub network: NetworkOptions,
}

/// Where files are.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Storage")]
pub struct StorageOptions {
    /// Holds `output_dir`, at /output: new:SIZE (a claim of the run), claim:NAME[/FOLDER],
    /// gs://BUCKET[/FOLDER] (GKE's Cloud Storage FUSE), or scratch:SIZE (lost with the pod; one node only).
    #[arg(long, default_value = "new:100Gi", value_name = "PLACE")]
    pub output: FileStore,
    /// Holds preference files and models, read-only at /data: claim:NAME[/FOLDER], configmap:NAME or
    /// gs://BUCKET[/FOLDER].
    #[arg(long, value_name = "PLACE")]
    pub data: Option<FileStore>,
    /// Storage class of a new claim [default: the cluster's].
    #[arg(long, value_name = "CLASS")]
    pub storage_class: Option<String>,
    /// Memory for /dev/shm, which NCCL uses; counts as the pod's memory.
    #[arg(long, default_value = "8Gi", value_name = "SIZE")]
    pub shm_size: Quantity,
    /// Disk for /tmp: caches and downloaded models.
    #[arg(long, default_value = "50Gi", value_name = "SIZE")]
    pub scratch_size: Quantity,
}

/// Resources and placement of the pods.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Scheduling")]
pub struct SchedulingOptions {
    /// CPU cores of each training pod.
    #[arg(long, value_name = "CORES")]
    pub cpus: Option<Quantity>,
    /// Memory of each training pod.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Quantity>,
    /// Resource name of the GPUs.
    #[arg(long, default_value = "nvidia.com/gpu", value_name = "NAME")]
    pub gpu_resource: String,
    /// RDMA devices of each training pod, e.g. rdma/hca_shared_devices_a=1. Adds IPC_LOCK: the namespace can then no longer
    /// enforce the pod security standard `restricted`.
    #[arg(long, value_name = "RESOURCE[=N]")]
    pub rdma: Option<Rdma>,
    /// Label that training nodes must have; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub node_selector: Vec<Label>,
    /// Taint that training pods tolerate; may be repeated. The GPU resource's own taint always is.
    #[arg(long, value_name = "KEY[=VALUE][:EFFECT]")]
    pub toleration: Vec<Toleration>,
    /// How training pods spread over a topology: KEY=required or KEY=preferred.
    #[arg(long, default_value = "kubernetes.io/hostname=preferred", value_name = "KEY=MODE")]
    pub spread: Spread,
    /// Kueue LocalQueue that admits the run.
    #[arg(long, value_name = "QUEUE")]
    pub queue: Option<String>,
    /// Kueue WorkloadPriorityClass.
    #[arg(long, value_name = "CLASS", requires = "queue")]
    pub queue_priority: Option<String>,
    /// Kueue topology level that all training pods must share, e.g. cloud.provider.com/topology-block.
    #[arg(long, value_name = "LEVEL", requires = "queue")]
    pub queue_topology: Option<String>,
    /// PriorityClass of the pods.
    #[arg(long, value_name = "CLASS")]
    pub priority_class: Option<String>,
    /// Secret for pulling the image.
    #[arg(long, value_name = "NAME")]
    pub image_pull_secret: Option<String>,
}

/// How the run ends and starts again.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Ends and restarts")]
pub struct LifecycleOptions {
    /// Restarts after failures; each continues from the last checkpoint. Evictions do not count.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub max_restarts: u16,
    /// Seconds between SIGTERM and SIGKILL: a step and a checkpoint must fit.
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub grace_period: u32,
    /// Seconds that the coordinator waits for all trainers: scheduling and image pulls must fit.
    #[arg(long, default_value_t = 3600, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=604_800))]
    pub join_timeout: u32,
    /// Seconds from the run's end until its workload is removed; its claim stays. 0 keeps the workload.
    #[arg(long, default_value_t = 604_800, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=31_536_000))]
    pub ttl: u32,
}

/// Network and environment of the pods.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Network")]
pub struct NetworkOptions {
    /// OTLP endpoint for traces, e.g. http://otel-collector.observability:4317.
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Namespace whose pods may scrape the coordinator's metrics (port 9464).
    #[arg(long, default_value = "monitoring", value_name = "NAMESPACE")]
    pub metrics_namespace: String,
    /// Render no NetworkPolicy.
    #[arg(long)]
    pub no_network_policy: bool,
    /// Environment variable of all containers; may be repeated, e.g. NCCL_DEBUG=INFO.
    #[arg(long, value_name = "KEY=VALUE")]
    pub env: Vec<Label>,
    /// Secret whose keys become environment variables of the training containers, e.g. one with HF_TOKEN.
    #[arg(long, value_name = "NAME")]
    pub env_from_secret: Option<String>,
}

/// Options of `render`.
#[derive(Args, Clone, Debug)]
pub struct RenderOptions {
    /// The run.
    #[command(flatten)]
    pub run: RunOptions,
    /// Which objects.
    #[arg(long, value_enum, default_value_t = ManifestPart::All)]
    pub part: ManifestPart,
    /// Write one file per object and a kustomization.yaml into this folder, instead of printing. The run's Secrets, which hold private
    /// keys, are left out, because such folders are often committed to a repository
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Write the Secrets too, each into a file that only you can read
    #[arg(long, requires = "output_dir")]
    pub with_secrets: bool,
}

/// Options of `apply`.
#[derive(Args, Clone, Debug)]
pub struct ApplyOptions {
    /// The run.
    #[command(flatten)]
    pub run: RunOptions,
    /// The cluster.
    #[command(flatten)]
    pub cluster: ClusterOptions,
    /// With `server`, the server only checks the objects and stores nothing.
    #[arg(long, value_enum, default_value_t = DryRun::None, value_name = "none|server")]
    pub dry_run: DryRun,
    /// Take over fields that another tool owns.
    #[arg(long)]
    pub force_conflicts: bool,
    /// Follow the run until it ends.
    #[arg(long)]
    pub wait: bool,
}

/// Whether the server stores the objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DryRun {
    /// Yes.
    None,
    /// No: the server only checks.
    Server,
}

/// Options of `status`.
#[derive(Args, Clone, Debug)]
pub struct StatusOptions {
    /// The run.
    #[command(flatten)]
    pub run: RunName,
    /// The cluster.
    #[command(flatten)]
    pub cluster: ClusterOptions,
}

/// Options of `logs`.
#[derive(Args, Clone, Debug)]
pub struct LogsOptions {
    /// The run.
    #[command(flatten)]
    pub run: RunName,
    /// The cluster.
    #[command(flatten)]
    pub cluster: ClusterOptions,
    /// Follow the logs until the pods end.
    #[arg(long, short)]
    pub follow: bool,
    /// Only the last lines of each pod.
    #[arg(long, value_name = "LINES")]
    pub tail: Option<u32>,
}

/// Options of `wait`.
#[derive(Args, Clone, Debug)]
pub struct WaitOptions {
    /// The run.
    #[command(flatten)]
    pub run: RunName,
    /// The cluster.
    #[command(flatten)]
    pub cluster: ClusterOptions,
    /// Stop following after this many seconds, with exit status 3; the run goes on.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// Show every log line of the coordinator.
    #[arg(long)]
    pub verbose: bool,
}

/// Options of `delete`.
#[derive(Args, Clone, Debug)]
pub struct DeleteOptions {
    /// The run.
    #[command(flatten)]
    pub run: RunName,
    /// The cluster.
    #[command(flatten)]
    pub cluster: ClusterOptions,
    /// Keep the run's claim, with checkpoints and model.
    #[arg(long)]
    pub keep_checkpoints: bool,
    /// Do not ask.
    #[arg(long, short)]
    pub yes: bool,
}
