//! Proves that a journal directory which is not as a process and a crash leave it is refused with one line and an exit code, that nothing in
//! it is changed, and that the explicit repair keeps whatever can be read; and that what a crash does leave is taken without complaint.

use std::{collections::BTreeMap, fs, os::unix::fs::FileExt, path::Path};

use tidegate::rpc::proto::ReadConsistency;

use crate::harness::{
    Gateway, Mode, Setup,
    disk::Disk,
    gateway::{Exit, Output, data_dir, run_command},
    process::Directory,
};

/// How many writes the journal under test holds.
const WRITES: usize = 40;
const VALUE_BYTES: usize = 60_000;

fn setup() -> Setup {
    Setup::new().config(
        "[rpc]\nvalue_bytes_max = 100000\n[journal]\nsegment_bytes = 1048576\nbytes_max = 33554432\n\
         [namespace_defaults]\nwrite_delay = \"1h\"",
    )
}

fn value(index: usize) -> Vec<u8> {
    let mut value = index.to_string().into_bytes();
    value.resize(VALUE_BYTES, b'x');
    value
}

/// The directory of a killed gateway whose journal has at least three segments of writes that the store does not have.
async fn killed() -> Directory {
    let mut gateway = setup().start().await;
    for index in 0..WRITES {
        gateway
            .client
            .put(&index.to_string(), &value(index), Mode::Behind)
            .await
            .unwrap();
    }
    gateway.kill().await;
    gateway.leave()
}

/// A copy of a directory: the data in it, and the configuration.
fn copy(directory: &Directory) -> Directory {
    let copy = Directory::new("gateway");
    let status = std::process::Command::new("cp")
        .arg("-a")
        .arg(data_dir(directory))
        .arg(directory.path().join("tidegate.toml"))
        .arg(copy.path())
        .status()
        .expect("cp can be run");
    assert!(status.success(), "{status}");
    copy
}

/// Every file of a directory with its content.
fn contents(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(path).expect("it is a directory");
    let files = entries.map(|entry| {
        let entry = entry.expect("it can be read");
        let content = fs::read(entry.path()).expect("it can be read");
        (entry.file_name().into_string().expect("names are text"), content)
    });
    files.collect()
}

/// The names of the segments that hold something, the oldest first.
fn segments(journal: &Path) -> Vec<String> {
    let all = contents(journal).into_iter();
    let used =
        all.filter(|(name, content)| name.starts_with("segment-") && content[512..].iter().any(|byte| *byte != 0));
    used.map(|(name, _)| name).collect()
}

async fn journal_command(action: &str, directory: &Directory) -> Output {
    let data = data_dir(directory);
    let file = directory.path().join("tidegate.toml");
    let arguments = [
        "journal",
        action,
        "--config",
        file.to_str().expect("paths of tests are text"),
        "--data-dir",
        data.to_str().expect("paths of tests are text"),
    ];
    run_command(&arguments, &[], Directory::new("command").path()).await
}

/// Asserts that a start ends with this code and one line that says all of `words`.
#[track_caller]
fn assert_refused(exit: &Exit, code: i32, words: &[&str]) {
    assert_eq!(exit.code, Some(code), "{exit:?}");
    assert_eq!(exit.log.lines().count(), 1, "{exit:?}");
    assert!(exit.log.starts_with("tidegate: "), "{exit:?}");
    assert!(exit.log.matches("os error").count() <= 1, "said twice: {exit:?}");
    for word in words {
        assert!(exit.log.contains(word), "{word}: {exit:?}");
    }
}

/// The keys of which a started gateway reads the value that was put, by their numbers.
async fn readable(gateway: &Gateway) -> Vec<usize> {
    let mut found = Vec::new();
    for index in 0..WRITES {
        let read = gateway.client.value(&index.to_string(), ReadConsistency::Cached).await;
        if let Some(read) = read {
            assert!(read == value(index), "a value that was never put for {index}");
            found.push(index);
        }
    }
    found
}

/// Damage, what is said about it, and how many of the writes may be lost by it.
struct Case {
    name: &'static str,
    /// Gets the directory of the journal and its segments in use; says which file is at fault.
    damage: fn(&Path, &[String]) -> String,
    words: &'static [&'static str],
    /// Whether the repair does anything about it.
    repairable: bool,
    /// Whether every write is still there afterwards.
    whole: bool,
}

const CASES: &[Case] = &[
    Case {
        name: "an empty file in the place of a segment",
        damage: |journal, segments| {
            fs::write(journal.join(&segments[1]), b"").unwrap();
            segments[1].clone()
        },
        words: &["no segment of a journal", "it is empty", "tidegate journal repair"],
        repairable: true,
        whole: false,
    },
    Case {
        name: "a foreign file under a segment's name",
        damage: |journal, _| {
            let name = contents(journal).into_keys().rfind(|name| name.starts_with("segment-"));
            let last = name.expect("there are segments");
            let id = u64::from_str_radix(&last["segment-".len()..], 16).unwrap();
            let foreign = format!("segment-{:016x}", id + 1);
            fs::write(journal.join(&foreign), "Dear diary,\n".repeat(1_000)).unwrap();
            foreign
        },
        words: &[
            "no segment of a journal",
            "does not begin like one",
            "tidegate journal repair",
        ],
        repairable: true,
        whole: true,
    },
    Case {
        name: "a damaged header",
        damage: |journal, segments| {
            let file = fs::OpenOptions::new()
                .write(true)
                .open(journal.join(&segments[1]))
                .unwrap();
            file.write_all_at(b"rust", 400).unwrap();
            segments[1].clone()
        },
        words: &[
            "no segment of a journal",
            "its header is damaged",
            "tidegate journal repair",
        ],
        repairable: true,
        // Each group vouches for itself.
        whole: true,
    },
    Case {
        name: "a segment of a newer format",
        damage: |journal, segments| {
            let file = fs::OpenOptions::new()
                .write(true)
                .open(journal.join(&segments[1]))
                .unwrap();
            file.write_all_at(&2_u32.to_le_bytes(), 8).unwrap();
            segments[1].clone()
        },
        words: &["has format 2", "start the version that wrote it"],
        repairable: false,
        whole: false,
    },
    Case {
        name: "a hole in the sequence",
        damage: |journal, segments| {
            fs::remove_file(journal.join(&segments[1])).unwrap();
            segments[1].clone()
        },
        words: &["is missing", "tidegate journal repair"],
        repairable: true,
        whole: false,
    },
    Case {
        name: "the oldest segment gone",
        damage: |journal, segments| {
            fs::remove_file(journal.join(&segments[0])).unwrap();
            segments[0].clone()
        },
        words: &["is missing", "tidegate journal repair"],
        repairable: true,
        whole: false,
    },
    Case {
        name: "damage in the middle",
        damage: |journal, segments| {
            let file = fs::OpenOptions::new()
                .write(true)
                .open(journal.join(&segments[1]))
                .unwrap();
            file.write_all_at(b"rust", 400_000).unwrap();
            segments[1].clone()
        },
        words: &["is damaged at offset", "tidegate journal repair"],
        repairable: true,
        whole: false,
    },
];

#[tokio::test]
async fn what_no_crash_leaves_is_refused_and_left_alone_until_it_is_repaired() {
    let original = killed().await;
    let used = segments(&data_dir(&original).join("journal"));
    assert!(used.len() >= 3, "{used:?}");
    for case in CASES {
        let directory = copy(&original);
        let journal = data_dir(&directory).join("journal");
        let file = (case.damage)(&journal, &used);
        let before = contents(&journal);
        let words = [case.words, &[file.as_str()]].concat();

        let exit = setup().run_to_end_in(&directory).await;
        assert_refused(&exit, 65, &words);
        let inspected = journal_command("inspect", &directory).await;
        assert_eq!(inspected.code, Some(65), "{}: {inspected:?}", case.name);
        for word in &words {
            let said = inspected.stdout.contains(word) || inspected.stderr.contains(word);
            assert!(said, "{}: {word}: {inspected:?}", case.name);
        }
        for segment in contents(&journal).keys().filter(|name| name.starts_with("segment-")) {
            assert!(inspected.stdout.contains(segment), "{}: {inspected:?}", case.name);
        }
        assert!(contents(&journal) == before, "{}: something was changed", case.name);

        let repaired = journal_command("repair", &directory).await;
        if !case.repairable {
            assert_eq!(repaired.code, Some(65), "{}: {repaired:?}", case.name);
            assert!(contents(&journal) == before, "{}: something was changed", case.name);
            continue;
        }
        assert_eq!(repaired.code, Some(0), "{}: {repaired:?}", case.name);
        let after = contents(&journal);
        for (name, content) in before.iter().filter(|(name, _)| name.starts_with("segment-")) {
            let kept = after.get(&format!("damaged-{name}"));
            assert!(kept == Some(content), "{}: {name} is set aside as it was", case.name);
        }
        let gateway = setup().start_in(directory).await;
        let found = readable(&gateway).await;
        if case.whole {
            assert_eq!(found, Vec::from_iter(0..WRITES), "{}", case.name);
        } else {
            // One segment of three or more was hurt, and none beside it.
            assert!((WRITES / 4..WRITES).contains(&found.len()), "{}: {found:?}", case.name);
            assert!(found.contains(&(WRITES - 1)), "{}: {found:?}", case.name);
        }
        gateway
            .client
            .put("after", b"value", Mode::Behind)
            .await
            .expect("it works again");
    }
}

#[tokio::test]
async fn a_torn_tail_is_no_damage() {
    let original = killed().await;
    let journal = data_dir(&original).join("journal");
    let last = segments(&journal).pop().expect("there are segments");
    let content = fs::read(journal.join(&last)).unwrap();
    let end = content.iter().rposition(|byte| *byte != 0).expect("it holds something") + 1;
    // Cut within the last group, and cut so that all of it is gone.
    for (cut, expected) in [(1, WRITES - 1), (VALUE_BYTES / 2, WRITES - 1), (0, WRITES)] {
        let directory = copy(&original);
        let file = data_dir(&directory).join("journal").join(&last);
        let file = fs::OpenOptions::new().write(true).open(file).unwrap();
        file.write_all_at(&vec![0; cut], (end - cut) as u64).unwrap();
        let inspected = journal_command("inspect", &directory).await;
        assert_eq!(inspected.code, Some(0), "{cut}: {inspected:?}");
        assert!(
            inspected.stdout.contains(&format!("{expected} live writes")),
            "{inspected:?}"
        );
        assert!(inspected.stdout.trim_end().ends_with("in order"), "{inspected:?}");
        let before = contents(&data_dir(&directory).join("journal"));
        let repaired = journal_command("repair", &directory).await;
        assert_eq!(repaired.code, Some(0), "there is nothing to do: {repaired:?}");
        assert!(contents(&data_dir(&directory).join("journal")) == before);

        let mut gateway = setup().start_in(directory).await;
        assert_eq!(readable(&gateway).await.len(), expected, "{cut}");
        // What is appended behind the cut is read back as well.
        gateway.client.put("after", b"value", Mode::Behind).await.unwrap();
        gateway.kill().await;
        let gateway = gateway.start_again().await;
        assert_eq!(readable(&gateway).await.len(), expected, "{cut}");
        gateway.client.assert_everywhere("after", Some(b"value")).await;
    }
}

#[tokio::test]
async fn a_directory_that_cannot_be_used_ends_the_start() {
    let original = killed().await;
    // A file in its place.
    let directory = copy(&original);
    let journal = data_dir(&directory).join("journal");
    fs::remove_dir_all(&journal).unwrap();
    fs::write(&journal, b"not a directory").unwrap();
    let exit = setup().run_to_end_in(&directory).await;
    assert_refused(&exit, 69, &["journal"]);
    assert_eq!(fs::read(&journal).unwrap(), b"not a directory");
    for action in ["inspect", "repair"] {
        let output = journal_command(action, &directory).await;
        assert_eq!(output.code, Some(69), "{action}: {output:?}");
        assert_eq!(output.stderr.lines().count(), 1, "{action}: {output:?}");
    }

    // A file of it that cannot be read.
    let directory = copy(&original);
    let segment = data_dir(&directory).join("journal/segment-0000000000000001");
    fs::remove_file(&segment).unwrap();
    fs::create_dir(&segment).unwrap();
    let exit = setup().run_to_end_in(&directory).await;
    assert_refused(&exit, 69, &["segment-0000000000000001", "s a directory"]);
    for action in ["inspect", "repair"] {
        let output = journal_command(action, &directory).await;
        assert_eq!(output.code, Some(69), "{action}: {output:?}");
    }

    // One that cannot be written.
    let directory = copy(&original);
    let journal = data_dir(&directory).join("journal");
    let files = contents(&journal);
    fs::remove_dir_all(&journal).unwrap();
    fs::create_dir(&journal).unwrap();
    let disk = Disk::mount(&journal, 64 << 20);
    for (name, content) in &files {
        fs::write(journal.join(name), content).unwrap();
    }
    disk.make_read_only();
    let exit = setup().run_to_end_in(&directory).await;
    assert_refused(&exit, 69, &["journal", "ead-only"]);
    let inspected = journal_command("inspect", &directory).await;
    assert_eq!(
        inspected.code,
        Some(0),
        "reading needs no more than that: {inspected:?}"
    );
    let repaired = journal_command("repair", &directory).await;
    assert_eq!(repaired.code, Some(69), "{repaired:?}");
    assert!(contents(&journal) == files, "something was changed");
}

#[tokio::test]
async fn a_journal_in_use_is_read_and_nothing_else() {
    let gateway = setup().start().await;
    for index in 0..WRITES {
        gateway
            .client
            .put(&index.to_string(), &value(index), Mode::Behind)
            .await
            .unwrap();
    }
    let directory = gateway.directory();
    let journal = data_dir(directory).join("journal");
    let before = contents(&journal);
    let inspected = journal_command("inspect", directory).await;
    assert_eq!(inspected.code, Some(0), "{inspected:?}");
    assert!(
        inspected.stdout.contains(&format!("{WRITES} live writes")),
        "{inspected:?}"
    );
    let repaired = journal_command("repair", directory).await;
    assert_eq!(repaired.code, Some(69), "{repaired:?}");
    assert!(repaired.stderr.contains("in use"), "{repaired:?}");
    // By another process, too, that would serve from it.
    let exit = journal_command_serve(directory).await;
    assert_eq!(exit.code, Some(69), "{exit:?}");
    assert!(exit.stderr.contains("in use"), "{exit:?}");
    assert!(contents(&journal) == before, "something was changed");
    assert_eq!(readable(&gateway).await.len(), WRITES);
}

/// Mounted beside nothing: the first file of the journal does not fit.
#[tokio::test]
async fn a_disk_too_small_for_a_journal_ends_the_start() {
    let directory = Directory::new("gateway");
    let data = data_dir(&directory);
    fs::create_dir_all(data.join("journal")).unwrap();
    let disk = Disk::mount(&data.join("journal"), 512 << 10);
    for _ in 0..2 {
        let exit = setup().run_to_end_in(&directory).await;
        assert_refused(&exit, 69, &["journal", "storage"]);
    }
    // With more room it is as if nothing had been.
    drop(disk);
    let gateway = setup().start_in(directory).await;
    let put = gateway.client.put("key", b"value", Mode::Behind).await;
    put.expect("there is room");
}

/// A second gateway on the data of one that runs.
async fn journal_command_serve(directory: &Directory) -> Output {
    let data = data_dir(directory);
    let arguments = [
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        data.to_str().expect("text"),
    ];
    let elsewhere = [
        ("TIDEGATE_OPERATIONS__LISTEN", "127.0.0.1:0"),
        ("TIDEGATE_ADMIN__LISTEN", "127.0.0.1:0"),
    ];
    run_command(&arguments, &elsewhere, Directory::new("command").path()).await
}

#[tokio::test]
async fn there_is_nothing_to_inspect_where_no_gateway_was() {
    let directory = Directory::new("gateway");
    for action in ["inspect", "repair"] {
        let data = data_dir(&directory);
        let arguments = ["journal", action, "--data-dir", data.to_str().expect("text")];
        let output = run_command(&arguments, &[], Directory::new("command").path()).await;
        assert_eq!(output.code, Some(69), "{action}: {output:?}");
        assert!(!data.exists(), "{action}: nothing is made");
    }
}
