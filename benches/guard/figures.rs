//! The committed figures: their file, and what differs from them.

use std::{
    collections::BTreeMap,
    env::consts::ARCH,
    fmt::{self, Display, Formatter},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde::{Deserialize, Serialize};

use crate::Failure;

/// By how many percent a figure may be off, either way: a gain that is not committed would hide the next loss.
const TOLERANCE_PERCENT: f64 = 5.0;

/// What the file says at its top.
const HEAD: &str = "\
# Instructions of one call, counted by callgrind; written by `ci/bench-guard --write`, compared by `make bench-guard`.
# They hold for the compiler, the architecture and the valgrind below. The processor matters little: valgrind shows each that has AVX2 as the
# same one, so libc and the checksums choose the same code. Where it has none, they choose another.
";

/// Figures, and what they hold for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    compiler: String,
    architecture: String,
    valgrind: String,
    /// By the name of the call.
    pub instructions: BTreeMap<String, u64>,
}

impl Figures {
    /// None yet, of what is installed here.
    pub fn none() -> Result<Figures, Failure> {
        Ok(Figures {
            compiler: version("rustc")?,
            architecture: ARCH.to_owned(),
            valgrind: version("valgrind")?,
            instructions: BTreeMap::new(),
        })
    }

    /// Where they are kept.
    pub fn path() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/guard/figures.toml")
    }

    /// Those that are committed.
    pub fn committed() -> Result<Figures, Failure> {
        let path = Figures::path();
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(toml::from_str(&text)?)
    }

    /// Puts these in the place of the committed ones.
    pub fn commit(&self) -> Result<(), Failure> {
        fs::write(Figures::path(), format!("{HEAD}{}", toml::to_string(self)?))?;
        Ok(())
    }

    /// What else the others were made with.
    pub fn made_otherwise(&self, others: &Figures) -> Option<String> {
        let pairs = [
            (&self.compiler, &others.compiler),
            (&self.architecture, &others.architecture),
            (&self.valgrind, &others.valgrind),
        ];
        let differences = pairs.iter().filter(|(ours, theirs)| ours != theirs);
        let differences: Vec<String> = differences
            .map(|(ours, theirs)| format!("{theirs}, not {ours}"))
            .collect();
        (!differences.is_empty()).then(|| differences.join("; "))
    }
}

fn version(program: &str) -> Result<String, Failure> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// What became of a figure.
pub struct Verdict {
    /// How much more it is now.
    pub percent: f64,
}

impl Verdict {
    /// Of a figure that was committed as `was`.
    pub fn of(was: u64, now: u64) -> Verdict {
        Verdict {
            percent: (now as f64 / was as f64 - 1.0) * 100.0,
        }
    }

    /// Whether the committed figure still holds.
    pub fn stands(&self) -> bool {
        self.percent.abs() <= TOLERANCE_PERCENT
    }
}

impl Display for Verdict {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self.stands() {
            true => "as committed",
            false if self.percent > 0.0 => "a loss",
            false => "a gain, which must be committed too",
        })
    }
}
