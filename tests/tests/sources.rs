//! Where pairs come from: compressed files, JSON arrays, Parquet, folders, patterns, mixtures, the hub and object stores.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Output, Stdio};

use dyad_tests::python::interpreter;
use dyad_tests::serving::{Answer, Request, Server};
use dyad_tests::{Row, Workspace, number, pair, pair_lines, root, text};
use serde_json::{Value, json};

/// A run into `out`, with a cache of its own.
fn launch(workspace: &Workspace, args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = workspace.launcher(1, args);
    for name in ["HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"] {
        command.env_remove(name);
    }
    command.env("XDG_CACHE_HOME", workspace.path("cache")).envs(environment.iter().copied());
    command.output().unwrap()
}

/// A workspace whose configuration has these lines in place of the usual ones.
fn with_config(pairs: usize, config: &str) -> Workspace {
    let workspace = Workspace::with_model(pairs, "");
    let key = |line: &str| line.split(" = ").next().map(str::to_owned);
    let mut lines: Vec<&str> = dyad_tests::BASE.lines().collect();
    lines.retain(|line| config.lines().all(|own| key(own) != key(line)));
    workspace.write("run.toml", &format!("{}\n{config}", lines.join("\n")));
    workspace
}

/// The rows of a run on some places of pairs.
fn curve(workspace: &Workspace, places: &str, environment: &[(&str, &str)]) -> Vec<Row> {
    let key = format!("training_file={places}");
    let output = launch(workspace, &["--overwrite", "--set", &key], environment);
    assert!(output.status.success(), "{places}: {}", text(&output));
    workspace.rows("out/metrics.jsonl")
}

/// Fails unless two runs have the same numbers: the same content in the same order.
fn same(a: &[Row], b: &[Row], what: &str) {
    for name in ["loss", "grad_norm"] {
        let of = |rows: &[Row]| rows.iter().map(|row| number(row, name)).collect::<Vec<_>>();
        assert_eq!(of(a), of(b), "{what}: {name}");
    }
}

fn pack(program: &str, args: &[&str], workspace: &Workspace, from: &str, to: &str) {
    let file = fs::File::create(workspace.path(to)).unwrap();
    let mut command = Command::new(program);
    command.args(args).stdin(fs::File::open(workspace.path(from)).unwrap()).stdout(Stdio::from(file));
    assert!(command.status().unwrap().success(), "{program}");
}

/// The checksum is that of the content, so a run that began with a plain file goes on with the same file compressed.
#[test]
fn compressed_files_and_arrays_train_like_the_plain_file() {
    let workspace = with_config(16, "n_epochs = 2\n");
    let plain = curve(&workspace, "pairs.jsonl", &[]);
    pack("gzip", &["-c"], &workspace, "pairs.jsonl", "pairs.jsonl.gz");
    same(&plain, &curve(&workspace, "pairs.jsonl.gz", &[]), "gzip");
    // The kind is known by the content.
    fs::rename(workspace.path("pairs.jsonl.gz"), workspace.path("odd.name")).unwrap();
    same(&plain, &curve(&workspace, "odd.name", &[]), "gzip under another name");
    let lines = fs::read_to_string(workspace.path("pairs.jsonl")).unwrap();
    workspace.write("pairs.json", &format!("[\n{}\n]\n", lines.trim_end().replace('\n', ",\n")));
    same(&plain, &curve(&workspace, "pairs.json", &[]), "array");
    let unpacked: Vec<_> = fs::read_dir(workspace.path("cache/dyad/data")).unwrap().flatten().collect();
    assert_eq!(unpacked.len(), 2, "one copy of each content: {unpacked:?}");
}

#[test]
fn a_run_goes_on_with_the_same_content_in_another_file() {
    let workspace = with_config(16, "save_steps = 1\n");
    let first = launch(&workspace, &["--set", "max_steps=2"], &[]);
    assert!(first.status.success(), "{}", text(&first));
    pack("gzip", &["-c"], &workspace, "pairs.jsonl", "pairs.gz");
    let on = ["--resume", "--set", "training_file=pairs.gz", "--set", "max_steps=4"];
    let output = launch(&workspace, &on, &[]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(workspace.rows("out/metrics.jsonl").len(), 4);
    workspace.write("other.jsonl", &pair_lines(15));
    let output =
        launch(&workspace, &["--resume", "--set", "training_file=other.jsonl", "--set", "max_steps=6"], &[]);
    assert!(text(&output).contains("the SHA-256 of training_file was "), "{}", text(&output));
}

/// Several files are the pairs of one file after the other. With `shuffle = false` the order shows.
#[test]
fn lists_folders_and_patterns_train_on_all_their_files_in_order() {
    let workspace = with_config(16, "shuffle = false\nbatch_size = 4\n");
    let whole = curve(&workspace, "pairs.jsonl", &[]);
    let lines = pair_lines(16);
    let lines: Vec<&str> = lines.lines().collect();
    fs::create_dir(workspace.path("parts")).unwrap();
    for (at, part) in lines.chunks(6).enumerate() {
        workspace.write(&format!("parts/{at}.jsonl"), &(part.join("\n") + "\n"));
    }
    workspace.write("parts/README.md", "no pairs");
    for places in [
        "parts",
        "parts/*.jsonl",
        "[\"parts/0.jsonl\", \"parts/[12].jsonl\"]",
        "[\"parts/0.jsonl\", \"parts/1.jsonl\", \"parts/2.jsonl\"]",
    ] {
        same(&whole, &curve(&workspace, places, &[]), places);
    }
    // Errors name the file.
    workspace.write("parts/1.jsonl", &(pair_lines(2) + "{}\n"));
    let output = launch(&workspace, &["--overwrite", "--set", "training_file=parts"], &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).contains("parts/1.jsonl line 3: "), "{}", text(&output));
}

/// The log of a mixture shows nothing of the order, so the losses of one-token answers do: each file has its own pair.
#[test]
fn a_mixture_takes_pairs_by_weight_and_a_resume_continues_it() {
    let workspace = with_config(8, "batch_size = 4\nn_epochs = 3\nlearning_rate = 0\nsave_steps = 2\n");
    for (name, answer) in [("a", "Yes."), ("b", "No, I do not think so at all.")] {
        let line = pair("Is it?", answer, "Perhaps.").to_string() + "\n";
        workspace.write(&format!("{name}.jsonl"), &line.repeat(8));
    }
    let mixed = r#"[{ path = "a.jsonl", weight = 3 }, { path = "b.jsonl", weight = 1 }]"#;
    let tokens = |rows: &[Row]| number(rows.last().unwrap(), "num_tokens");
    let rows = curve(&workspace, mixed, &[]);
    assert_eq!(rows.len(), 12, "an epoch has as many pairs as both files");
    let [a, b] = ["a.jsonl", "b.jsonl"].map(|file| tokens(&curve(&workspace, file, &[])) / 24.0);
    // 12 of 16 pairs are of the first file.
    let expected = 3.0 * (12.0 * a + 4.0 * b);
    assert!((tokens(&rows) - expected).abs() < 1e-6, "{} and {expected}", tokens(&rows));
    let key = format!("training_file={mixed}");
    let stopped = launch(&workspace, &["--overwrite", "--set", &key, "--set", "max_steps=4"], &[]);
    assert!(stopped.status.success(), "{}", text(&stopped));
    let resumed = launch(&workspace, &["--resume", "--set", &key, "--set", "max_steps=12"], &[]);
    assert!(resumed.status.success(), "{}", text(&resumed));
    let again = workspace.rows("out/metrics.jsonl");
    for (row, other) in rows.iter().zip(&again) {
        assert_eq!(number(row, "num_tokens"), number(other, "num_tokens"));
    }
    // Other weights are other data.
    let other = key.replace("weight = 3", "weight = 2");
    let refused = launch(&workspace, &["--resume", "--set", &other, "--set", "max_steps=16"], &[]);
    assert!(text(&refused).contains("the SHA-256 of training_file was "), "{}", text(&refused));
}

/// Records as hosted APIs and TRL take them, with what Parquet makes hard: fields that only some records have, and lists in lists.
fn records() -> String {
    let mut lines = pair_lines(7);
    let system = json!({ "role": "system", "content": "Be brief. \u{1f600} \"quoted\" \\ \u{0} end" });
    for at in 0..4 {
        let mut line = pair(&format!("Number {at}?\n\n  indented"), "Good.", "Bad.");
        line["input"]["messages"].as_array_mut().unwrap().insert(0, system.clone());
        lines += &(line.to_string() + "\n");
    }
    lines
}

/// `datasets` and pyarrow write the tables; the runs on them have the numbers of the run on the JSON Lines.
#[test]
fn parquet_files_train_like_the_lines_that_they_were_made_from() {
    let workspace = with_config(8, "shuffle = false\nbatch_size = 3\n");
    workspace.write("pairs.jsonl", &records());
    fs::create_dir(workspace.path("tables")).unwrap();
    let mut command = Command::new(interpreter());
    command
        .arg(root().join("tests/parity/tables.py"))
        .args([workspace.path("pairs.jsonl"), workspace.path("tables")]);
    let output = command.env("HF_HOME", workspace.path("hf")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let lines = curve(&workspace, "pairs.jsonl", &[]);
    let tables: Vec<_> = fs::read_dir(workspace.path("tables")).unwrap().flatten().collect();
    assert_eq!(tables.len(), 8);
    for table in tables {
        let name = format!("tables/{}", table.file_name().display());
        same(&lines, &curve(&workspace, &name, &[]), &name);
    }
    // A damaged table is an error that names the file.
    let whole = fs::read(workspace.path("tables/zstd.parquet")).unwrap();
    for length in [whole.len() - 1, whole.len() / 2, 9] {
        fs::write(workspace.path("cut.parquet"), &whole[..length]).unwrap();
        let output = launch(&workspace, &["--overwrite", "--set", "training_file=cut.parquet"], &[]);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(
            text(&output).contains("error: training_file ")
                && text(&output).contains("cut.parquet cannot be unpacked: "),
            "{}",
            text(&output)
        );
    }
}

/// The hub's answers for the files of `org/set`, at the branch `main`.
fn hub(files: BTreeMap<&'static str, Vec<u8>>) -> Server {
    Server::start(move |request: &Request| {
        let path = request.plain_path();
        if path == "/api/datasets/org/set/revision/main" {
            let names: Vec<Value> = files.keys().map(|name| json!({ "rfilename": name })).collect();
            return Answer::of(json!({ "siblings": names, "sha": "c0ffee" }).to_string());
        }
        match path
            .strip_prefix("/datasets/org/set/resolve/main/")
            .and_then(|name| files.get(name).map(|body| (name, body)))
        {
            Some((name, body)) => Answer::of(body.clone())
                .header(format!("ETag: \"{}\"", name.replace('/', "-")))
                .header("X-Repo-Commit: c0ffee"),
            None => Answer::none(),
        }
    })
}

#[test]
fn data_sets_of_the_hub_are_fetched_once_and_then_found_offline() {
    let workspace = with_config(16, "shuffle = false\n");
    let plain = curve(&workspace, "pairs.jsonl", &[]);
    let lines = pair_lines(16);
    let half = lines.match_indices('\n').nth(7).unwrap().0 + 1;
    pack("gzip", &["-c"], &workspace, "pairs.jsonl", "pairs.gz");
    let packed = fs::read(workspace.path("pairs.gz")).unwrap();
    let server = hub(BTreeMap::from([
        ("README.md", b"# a set".to_vec()),
        ("data/train-0.jsonl", lines[..half].into()),
        ("data/train-1.jsonl", lines[half..].into()),
        ("packed.jsonl.gz", packed),
    ]));
    let online = [("HF_ENDPOINT", server.address.as_str())];
    for path in ["data", "data/train-*.jsonl", "packed.jsonl.gz"] {
        let address = format!("hf://datasets/org/set/{path}");
        same(&plain, &curve(&workspace, &address, &online), &address);
        let asked = server.requests().len();
        same(&plain, &curve(&workspace, &address, &[("HF_HUB_OFFLINE", "1")]), &address);
        assert_eq!(server.requests().len(), asked);
    }
    let fetched =
        server.requests().iter().filter(|request| request.path.ends_with("/packed.jsonl.gz")).count();
    assert_eq!(fetched, 2, "one request for its description, one for its content");
    let missing = ["--overwrite", "--set", "training_file=hf://datasets/org/set/test.jsonl"];
    let output = launch(&workspace, &missing, &online);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("names no file of pairs"), "{}", text(&output));
    assert!(
        text(&output).contains("the data set has data/train-0.jsonl, data/train-1.jsonl, packed.jsonl.gz"),
        "{}",
        text(&output)
    );
    // With a host that is not there, what was fetched before is used, and a line says so.
    let gone = launch(
        &workspace,
        &["--overwrite", "--set", "training_file=hf://datasets/org/set/data"],
        &[("HF_ENDPOINT", "http://127.0.0.1:9")],
    );
    assert!(
        gone.status.success() && text(&gone).contains("what was fetched last is used"),
        "{}",
        text(&gone)
    );
}

/// Enough of S3: signed requests for a listing, for the head and for ranges of objects.
fn s3(objects: BTreeMap<&'static str, Vec<u8>>) -> Server {
    Server::start(move |request: &Request| {
        if !request.headers.get("authorization").is_some_and(|sent| sent.contains("Credential=the-id/")) {
            return Answer {
                status: "403 Forbidden",
                ..Answer::of("<Error><Code>AccessDenied</Code></Error>")
            };
        }
        if let Some(prefix) = request.query("prefix") {
            let matching = objects.iter().filter(|(key, _)| key.starts_with(&prefix));
            let entries: String = matching
                .map(|(key, body)| {
                    format!(
                        "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>\"{key}-1\"</ETag><Size>{}</Size></Contents>",
                        body.len()
                    )
                })
                .collect();
            return Answer::of(format!(
                "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
            ));
        }
        let key = request.plain_path().strip_prefix("/bucket/").unwrap_or_default().replace("%20", " ");
        match objects.get(key.as_str()) {
            Some(body) => Answer::of(body.clone())
                .header(format!("ETag: \"{key}-1\""))
                .header("Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT"),
            None => Answer::none(),
        }
    })
}

#[test]
fn objects_of_s3_are_fetched_once_with_the_usual_credentials() {
    let workspace = with_config(16, "shuffle = false\n");
    let plain = curve(&workspace, "pairs.jsonl", &[]);
    let lines = pair_lines(16);
    let half = lines.match_indices('\n').nth(7).unwrap().0 + 1;
    let server = s3(BTreeMap::from([
        ("sets/a 1.jsonl", lines[..half].into()),
        ("sets/b.jsonl", lines[half..].into()),
        ("sets/notes.txt", b"x".to_vec()),
        ("all.jsonl", lines.as_bytes().to_vec()),
    ]));
    let environment = [
        ("AWS_ENDPOINT_URL", server.address.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "the-id"),
        ("AWS_SECRET_ACCESS_KEY", "the-secret"),
        ("AWS_REGION", "eu-central-1"),
    ];
    for address in
        ["s3://bucket/all.jsonl", "s3://bucket/sets/*.jsonl", "s3://bucket/sets", "s3://bucket/sets/"]
    {
        same(&plain, &curve(&workspace, address, &environment), address);
    }
    let bodies = server.requests().iter().filter(|request| request.headers.contains_key("range")).count();
    assert_eq!(bodies, 3, "every object is fetched once");
    let refused = |address: &str, environment: &[(&str, &str)]| {
        let output =
            launch(&workspace, &["--overwrite", "--set", &format!("training_file={address}")], environment);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        text(&output)
    };
    let said = refused("s3://bucket/none.jsonl", &environment);
    assert!(said.contains("s3://bucket/none.jsonl names no object of pairs"), "{said}");
    let mut other = environment;
    other[2].1 = "another-id";
    let said = refused("s3://bucket/all.jsonl", &other);
    assert!(said.contains("may not be read") && said.contains("check the credentials"), "{said}");
}

#[test]
fn objects_of_google_cloud_storage_are_fetched() {
    let workspace = with_config(8, "shuffle = false\n");
    let plain = curve(&workspace, "pairs.jsonl", &[]);
    let body = pair_lines(8);
    let server =
        Server::start(move |request: &Request| match request.plain_path().replace("%2E", ".").as_str() {
            "/bucket/set.jsonl" => Answer::of(body.clone())
                .header("ETag: \"1\"")
                .header("Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT"),
            _ => Answer::none(),
        });
    let environment = [
        ("GOOGLE_BASE_URL", server.address.as_str()),
        ("GOOGLE_SKIP_SIGNATURE", "true"),
        ("GOOGLE_ALLOW_HTTP", "true"),
    ];
    same(&plain, &curve(&workspace, "gs://bucket/set.jsonl", &environment), "gs");
}

#[test]
fn places_that_mean_nothing_are_refused_before_anything_starts() {
    let workspace = with_config(8, "");
    for (places, words) in [
        ("nothing/*.jsonl", "training_file: no file matches nothing/*.jsonl"),
        ("hf://org/set/x", "is no address of a data set's file"),
        ("s3://bucket", "is no address of an object"),
        ("[\"pairs.jsonl\", \"*.jsonl\"]", "pairs.jsonl is named twice"),
        ("[{ path = \"pairs.jsonl\", weight = 1 }, \"model\"]", "\"model\" has no weight"),
    ] {
        let output = launch(&workspace, &["--set", &format!("training_file={places}")], &[]);
        assert_eq!(output.status.code(), Some(2), "{places}: {}", text(&output));
        assert!(text(&output).contains(words), "{places}: {}", text(&output));
        assert!(!workspace.path("out/metrics.jsonl").exists());
    }
}
