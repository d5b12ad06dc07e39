//! Proves that the live page shows what a gateway does, and says so when it is away; and that its numbers are true, few, nobody's secret,
//! and not read more often because more people look.

mod browser;

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use serde_json::Value;
use tidegate::{operations::figures::BYTES_MAX, rpc::proto::ReadConsistency};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use self::browser::Browser;
use crate::harness::{Client, Database, Gateway, Mode, SOON, Setup, eventually, expect, process::free_port, redis};

const PARTS: [&str; 4] = ["/", "/page.js", "/page.css", "/figures"];

async fn figures(gateway: &Gateway) -> Value {
    let page = gateway.page("/figures").await;
    assert_eq!(page.status, 200, "{page:?}");
    assert!(page.body.len() < BYTES_MAX, "{} bytes", page.body.len());
    serde_json::from_str(&page.body).expect("one object")
}

/// Waits until the numbers, which may be a second old, are as wanted.
async fn await_figures(gateway: &Gateway, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    eventually(what, SOON, async || {
        let figures = figures(gateway).await;
        expect(wanted(&figures), &figures).map(|()| figures)
    })
    .await
}

fn of<'a>(list: &'a Value, field: &str, name: &str) -> &'a Value {
    let mut items = list.as_array().expect("a list").iter();
    items
        .find(|item| item[field] == name)
        .unwrap_or_else(|| panic!("{name} is not in {list}"))
}

#[tokio::test]
async fn the_numbers_are_what_was_done() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    let client = &gateway.client;
    client.put("secret-key", b"secret-value", Mode::Through).await.unwrap();
    for _ in 0..3 {
        client.read("secret-key").await;
    }
    client.get("secret-key", ReadConsistency::Store).await.unwrap();
    client
        .put("", b"secret-value", Mode::Through)
        .await
        .expect_err("no key");
    client.put("secret-late", b"value", Mode::Behind).await.unwrap();
    let told = await_figures(&gateway, "what was put has left the queue", |told| told["drained"] == 1).await;

    let put = of(&told["calls"], "method", "Put");
    assert_eq!((&put["ok"], &put["failed"]), (&2.into(), &1.into()), "{told}");
    let get = of(&told["calls"], "method", "Get");
    let timed: u64 = get["latency"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_u64)
        .sum();
    assert_eq!((&get["ok"], timed), (&4.into(), 4), "{told}");
    let bounds = told["latency_bounds_micros"].as_array().unwrap();
    assert_eq!(bounds.len() + 1, get["latency"].as_array().unwrap().len(), "{told}");
    let l1 = of(&told["tiers"], "tier", "l1");
    assert_eq!((&l1["hits"], &l1["misses"]), (&3.into(), &0.into()), "{told}");
    assert_eq!((&told["accepted"], &told["pending"]["entries"]), (&1.into(), &0.into()));
    let orders = of(&told["namespaces"], "name", "orders");
    assert_eq!((&orders["writes"], &orders["store_reads"]), (&2.into(), &1.into()));
    for (part, state) in [("store", "up"), ("cache", "none"), ("journal", "up"), ("clock", "ok")] {
        assert_eq!(of(&told["parts"], "part", part)["state"], state, "{told}");
    }
    assert_eq!((&told["ready"], &told["dead_letters"]), (&true.into(), &0.into()));
    let (text, url) = (told.to_string(), database.url());
    assert!(!text.contains("secret") && !text.contains(url), "{text}");
}

#[tokio::test]
async fn what_is_pending_is_told_and_how_old_it_is() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    let hold = database.hold_writes().await;
    for key in ["a", "b"] {
        gateway.client.put(key, b"value", Mode::Behind).await.unwrap();
    }
    let told = await_figures(&gateway, "the oldest write grows old", |told| {
        told["pending"]["oldest_age_seconds"].as_f64() > Some(1.0)
    })
    .await;
    assert_eq!((&told["pending"]["entries"], &told["drained"]), (&2.into(), &0.into()));
    hold.release().await;
    let told = await_figures(&gateway, "they have left", |told| told["drained"] == 2).await;
    assert_eq!(told["pending"]["entries"], 0);
}

#[tokio::test]
async fn as_many_namespaces_as_there_may_be_leave_the_answer_short() {
    let gateway = Setup::new().start().await;
    for number in 0..30 {
        // The longest name that there is.
        let client = gateway.client.namespace(&format!("n{number:0>62}"));
        for _ in 0..=number {
            client.read("key").await;
        }
    }
    let told = await_figures(&gateway, "all are counted", |told| told["namespaces_more"] == 10).await;
    let namespaces = told["namespaces"].as_array().unwrap();
    let names: Vec<&str> = namespaces.iter().filter_map(|one| one["name"].as_str()).collect();
    assert_eq!((names.len(), names[0]), (20, &*format!("n{:0>62}", 29)), "{names:?}");
    assert!(
        !names.contains(&&*format!("n{:0>62}", 0)),
        "the least used are left out"
    );
}

#[tokio::test]
async fn however_many_look_the_numbers_are_read_once_a_second() {
    let gateway = std::sync::Arc::new(Setup::new().start().await);
    let started = Instant::now();
    let mut looking = JoinSet::new();
    for _ in 0..20 {
        let gateway = gateway.clone();
        looking.spawn(async move {
            let mut seen = Vec::new();
            for _ in 0..20 {
                seen.push(figures(&gateway).await["uptime_seconds"].to_string());
            }
            seen
        });
    }
    let readings: BTreeSet<String> = looking.join_all().await.into_iter().flatten().collect();
    let seconds = started.elapsed().as_secs() as usize;
    assert!(readings.len() <= seconds + 2, "{} in {seconds} s", readings.len());
    await_figures(&gateway, "they are read again", |told| {
        !readings.contains(&told["uptime_seconds"].to_string())
    })
    .await;
}

#[tokio::test]
async fn the_page_binds_the_browser_to_itself_and_takes_nothing() {
    let gateway = Setup::new().start().await;
    for path in PARTS {
        let got = gateway.page(path).await;
        assert_eq!(got.status, 200, "{path}");
        let head = got.head.to_lowercase();
        for line in [
            "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';",
            "x-content-type-options: nosniff",
            "cache-control: no-store",
        ] {
            assert!(head.contains(line), "{path} without {line}: {head}");
        }
        let alone = gateway.ask("HEAD", path).await;
        assert_eq!((alone.status, alone.body.as_str()), (200, ""), "{path}");
        for method in ["POST", "PUT", "DELETE", "PATCH"] {
            assert_eq!(gateway.ask(method, path).await.status, 405, "{method} {path}");
        }
    }
}

/// Calls a gateway until it is dropped: reads of a few keys, and writes of both kinds.
fn load(client: &Client) -> JoinSet<()> {
    let mut load = JoinSet::new();
    for (caller, namespace) in ["orders", "sessions", "prices"].into_iter().enumerate() {
        let client = client.namespace(namespace);
        load.spawn(async move {
            for round in 0_u64.. {
                let key = format!("key-{}", (round * 7) % (20 + caller as u64 * 400));
                let mode = if round % 40 == 0 { Mode::Through } else { Mode::Behind };
                // The gateway is taken away in the middle of it.
                let write = async || client.put(&key, &[b'v'; 200], mode).await.is_ok();
                let well = if round % 4 == 0 {
                    write().await
                } else {
                    client.get(&key, ReadConsistency::Cached).await.is_ok()
                };
                if !well {
                    sleep(Duration::from_millis(50)).await;
                }
            }
        });
    }
    load
}

fn number(text: &str) -> f64 {
    text.replace(',', "").parse().unwrap_or(f64::NAN)
}

/// The browser, or a word that there is none and that the test proves nothing here.
fn installed() -> Option<std::path::PathBuf> {
    let program = Browser::installed();
    if program.is_none() {
        eprintln!("SKIPPED: there is no chromium on this machine");
    }
    program
}

const PHONE: (u32, u32) = (360, 740);
const DESK: (u32, u32) = (1280, 1500);

#[tokio::test]
async fn the_page_shows_numbers_that_move_and_says_when_the_gateway_is_away() {
    let Some(program) = installed() else { return };
    let port = free_port();
    let setup = Setup::new().config(&format!("[operations]\nlisten = \"127.0.0.1:{port}\""));
    let mut gateway = setup.start().await;
    let calling = load(&gateway.client);
    let mut browser = Browser::open(&program, &format!("http://127.0.0.1:{port}/"), DESK).await;

    browser
        .await_text("[data-now=requests]", |text| number(text) > 0.0)
        .await;
    let total = "#calls tbody tr td:last-child";
    let before = number(&browser.text(total).await);
    browser.await_text(total, |text| number(text) > before).await;
    eventually("the chart has a line", SOON, async || {
        let path = browser
            .value("document.querySelector('[data-chart=requests] path')?.getAttribute('d') ?? ''")
            .await;
        expect(path.as_str().is_some_and(|path| path.contains('L')), path)
    })
    .await;
    let label = browser
        .value("document.querySelector('[data-chart=requests] svg').getAttribute('aria-label')")
        .await;
    let label = label.as_str().unwrap();
    assert!(label.contains("Get") && label.contains("Put"), "{label}");
    for selector in ["#tiers tbody", "#namespaces tbody", "[data-chart=latency] ul"] {
        browser.await_text(selector, |text| !text.is_empty()).await;
    }
    assert!(browser.text("#namespaces tbody").await.contains("sessions"));
    assert!(browser.text("#parts").await.contains("up, breaker closed"));
    browser
        .await_text("#contact", |text| text == "The gateway answers.")
        .await;
    drop(calling);
    browser.await_text("[data-now=requests]", |text| text == "0").await;

    gateway.freeze();
    browser
        .await_text("#contact", |text| text.contains("no answer in 3 s"))
        .await;
    let age = |text: &str| text.split(' ').nth(2).and_then(|age| age.parse().ok()).unwrap_or(0);
    browser.await_text("#age", |text| age(text) >= 5).await;
    gateway.thaw();
    browser
        .await_text("#contact", |text| text.contains("answers again, after"))
        .await;
    browser.await_text("#age", |text| age(text) <= 1).await;

    gateway.kill().await;
    let away = browser
        .await_text("#contact", |text| text.contains("no connection"))
        .await;
    assert!(
        away.contains("does not answer since") && away.contains("What is shown is old"),
        "{away}"
    );
    assert_eq!(browser.value("document.body.dataset.contact").await, "away");
    let _gateway = gateway.start_again().await;
    browser
        .await_text("#contact", |text| text.contains("was started anew"))
        .await;
    assert_eq!(browser.value("document.body.dataset.contact").await, "here");
    assert_eq!(browser.complaints(), Vec::<Value>::new());
}

/// How far two colours of the page are apart, as the guidelines for accessible content count it.
const CONTRAST: &str = "((a, b) => {
    const light = (name) => {
        const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
        const parts = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255);
        const [r, g, b] = parts.map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const [low, high] = [light(a), light(b)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
})";

#[tokio::test]
async fn the_page_can_be_read_on_a_phone_and_in_the_dark() {
    let Some(program) = installed() else { return };
    let gateway = Setup::new().start().await;
    let _calling = load(&gateway.client);
    let url = format!("http://{}/", gateway.operations);
    let mut browser = Browser::open(&program, &url, PHONE).await;
    browser.await_text("#namespaces tbody", |text| !text.is_empty()).await;
    let width = browser.value("document.documentElement.scrollWidth").await;
    assert!(width.as_u64() <= Some(u64::from(PHONE.0)), "{width} points wide");
    let mut grounds = BTreeSet::new();
    for scheme in ["light", "dark"] {
        browser.prefer(scheme).await;
        let ground = browser.value("getComputedStyle(document.body).backgroundColor").await;
        grounds.insert(ground.to_string());
        for (ink, paper, least) in [
            ("--text", "--ground", 7.0),
            ("--text", "--card", 7.0),
            ("--text", "--bad-ground", 7.0),
            ("--quiet", "--card", 4.5),
            ("--quiet", "--ground", 4.5),
            ("--line-0", "--ground", 4.5),
            ("--line-1", "--card", 3.0),
            ("--line-2", "--card", 3.0),
            ("--line-3", "--card", 3.0),
            ("--line-4", "--card", 3.0),
            ("--line-5", "--card", 3.0),
        ] {
            let contrast = browser.value(&format!("{CONTRAST}({ink:?}, {paper:?})")).await;
            assert!(
                contrast.as_f64() >= Some(least),
                "{scheme}: {ink} on {paper}: {contrast}"
            );
        }
    }
    assert_eq!(grounds.len(), 2, "{grounds:?}");
    assert_eq!(browser.complaints(), Vec::<Value>::new());
}

/// Not a proof: makes the pictures of the documentation.
#[tokio::test]
#[ignore = "takes a minute and writes into docs/images"]
async fn pictures() {
    let Some(program) = installed() else { return };
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let gateway = Setup::new().store(database.url()).redis(&redis.url()).start().await;
    let _calling = load(&gateway.client);
    let url = format!("http://{}/", gateway.operations);
    let mut desk = Browser::open(&program, &url, DESK).await;
    let mut phone = Browser::open(&program, &url, PHONE).await;
    phone.prefer("dark").await;
    // The charts begin when the page is opened.
    sleep(Duration::from_secs(70)).await;
    let images = Path::new("docs/images");
    fs::create_dir_all(images).unwrap();
    fs::write(images.join("live-page.png"), desk.picture().await).unwrap();
    desk.prefer("dark").await;
    fs::write(images.join("live-page-dark.png"), desk.picture().await).unwrap();
    fs::write(images.join("live-page-phone.png"), phone.picture().await).unwrap();
}
