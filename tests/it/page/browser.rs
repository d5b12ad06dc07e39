//! A browser without a window, where one is installed: Chromium, driven over its debugging pipe.
//!
//! Owns finding it, starting it with a profile that is thrown away, and asking a page that it shows. What is said to it goes into a named
//! pipe; what it says comes into a file, one message after the other, each ended by a zero byte.

use std::{
    env, fs,
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::harness::{
    SOON, eventually, expect,
    process::{Directory, Process},
};

/// The browser as whatever may be its last process. Arguments: the directory, the program.
const START: &str = r#"
mkfifo "$1/said" && exec "$2" --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions \
    --disable-background-networking --disable-component-update --no-proxy-server --hide-scrollbars \
    --user-data-dir="$1/profile" --remote-debugging-pipe about:blank 3<>"$1/said" 4>"$1/heard"
"#;

/// A page in a browser. Dropping it ends the browser.
pub struct Browser {
    said: File,
    heard: PathBuf,
    asked: u64,
    session: Option<String>,
    process: Process,
    /// Goes after the process that writes into it.
    _directory: Directory,
}

impl Browser {
    /// The program; `None`: there is none on this machine.
    pub fn installed() -> Option<PathBuf> {
        let path = env::var_os("PATH")?;
        env::split_paths(&path)
            .flat_map(|directory| ["chromium", "chromium-browser", "google-chrome"].map(|name| directory.join(name)))
            .find(|program| program.is_file())
    }

    /// Starts a browser that shows a page, in a window of this many points.
    pub async fn open(program: &Path, url: &str, size: (u32, u32)) -> Browser {
        let directory = Directory::new("browser");
        let path = directory.path();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", START, "browser"]).arg(path).arg(program);
        command.env("HOME", path).current_dir(path);
        let process = Process::start("the browser", &command, "KILL", path, "browser");
        let heard = path.join("heard");
        until_there(&heard, &process).await;
        let said = OpenOptions::new().read(true).write(true).open(path.join("said"));
        let mut browser = Browser {
            said: said.expect("the pipe is there"),
            heard,
            asked: 0,
            session: None,
            process,
            _directory: directory,
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"})).await;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", attach).await;
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Runtime.enable", "Log.enable", "Page.enable"] {
            browser.call(domain, json!({})).await;
        }
        browser.resize(size).await;
        browser.call("Page.navigate", json!({"url": url})).await;
        browser
    }

    /// Shows the page in a window of another size.
    pub async fn resize(&mut self, (width, height): (u32, u32)) {
        let metrics = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", metrics).await;
    }

    /// Has the user prefer `light` or `dark`.
    pub async fn prefer(&mut self, scheme: &str) {
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", features).await;
    }

    /// What an expression is worth in the page.
    pub async fn value(&mut self, expression: &str) -> Value {
        let ask = json!({"expression": expression, "returnByValue": true});
        let mut answer = self.call("Runtime.evaluate", ask).await;
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].take()
    }

    /// The text of the first element that a selector finds; empty where there is none.
    pub async fn text(&mut self, selector: &str) -> String {
        let selector = Value::from(selector);
        let text = self
            .value(&format!("document.querySelector({selector})?.textContent ?? ''"))
            .await;
        text.as_str().expect("text").to_owned()
    }

    /// Waits until the text of an element is as wanted, and gives it.
    pub async fn await_text(&mut self, selector: &str, wanted: impl Fn(&str) -> bool) -> String {
        eventually(&format!("{selector} is as wanted"), SOON, async || {
            let text = self.text(selector).await;
            expect(wanted(&text), &text).map(|()| text)
        })
        .await
    }

    /// The page as a picture: PNG.
    pub async fn picture(&mut self) -> Vec<u8> {
        let picture = self.call("Page.captureScreenshot", json!({"format": "png"})).await;
        let text = picture["data"].as_str().expect("a picture");
        BASE64_STANDARD.decode(text).expect("a picture in base64")
    }

    /// What the browser has said of the page's script and of what its policy forbids it.
    pub fn complaints(&self) -> Vec<Value> {
        let is_complaint = |message: &Value| match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            // A gateway that is away is no fault of the page.
            Some("Log.entryAdded") => message["params"]["entry"]["source"] != "network",
            _ => false,
        };
        self.messages().into_iter().filter(is_complaint).collect()
    }

    async fn call(&mut self, method: &str, params: Value) -> Value {
        self.asked += 1;
        let id = self.asked;
        let mut message = json!({"id": id, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        self.said
            .write_all(format!("{message}\0").as_bytes())
            .expect("the pipe takes it");
        let mut answer = eventually(&format!("the browser answers {method}"), SOON, async || {
            let answer = self.messages().into_iter().find(|message| message["id"] == id);
            answer.ok_or_else(|| self.process.stderr())
        })
        .await;
        assert!(answer["error"].is_null(), "{method}: {answer}");
        answer["result"].take()
    }

    fn messages(&self) -> Vec<Value> {
        let heard = fs::read(&self.heard).unwrap_or_default();
        // The last one may still be coming.
        let whole = heard.split(|byte| *byte == 0);
        whole
            .filter_map(|message| serde_json::from_slice(message).ok())
            .collect()
    }
}

async fn until_there(path: &Path, process: &Process) {
    eventually("the browser is there", SOON, async || {
        expect(path.exists(), process.stderr())
    })
    .await;
}
