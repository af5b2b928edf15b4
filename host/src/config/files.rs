//! Reads one file, or a folder of files that are merged by top-level key.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{Error, Located};
use crate::problems::{KeyPath, Place, Places, Problem, Problems};
use crate::yaml;

/// Largest file.
const FILE_BYTES_MAX: u64 = 4 << 20;
const FILES_MAX: usize = 256;

/// The contents of all files as one value.
#[derive(Debug)]
pub struct Files {
    names: Vec<PathBuf>,
    pub value: Value,
    pub problems: Vec<Problem>,
    /// Warnings about settings that are valid but probably not intended.
    pub warnings: Vec<String>,
    /// Index of the file, and line, of each key.
    lines: BTreeMap<KeyPath, (usize, usize)>,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            names: Vec::new(),
            value: Value::Object(Map::new()),
            problems: Vec::new(),
            warnings: Vec::new(),
            lines: BTreeMap::new(),
        }
    }
}

/// Reads a file, or the `.yaml` and `.yml` files of a folder in the order of their names. Hidden files
/// are skipped (`..data` of a Kubernetes ConfigMap).
pub fn read(path: &Path) -> Result<Files, Error> {
    let failed =
        |path: &Path, error: std::io::Error| Error::Read { path: path.to_owned(), error: error.to_string() };
    let names = if path.is_dir() {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(path).map_err(|error| failed(path, error))? {
            let name = entry.map_err(|error| failed(path, error))?.path();
            let is_yaml = name.extension().is_some_and(|e| e == "yaml" || e == "yml");
            let is_hidden = name.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
            if is_yaml && !is_hidden && name.is_file() {
                names.push(name);
            }
        }
        if names.is_empty() || names.len() > FILES_MAX {
            let error = match names.len() {
                0 => "the folder has no .yaml file".to_owned(),
                many => format!("the folder has {many} .yaml files, {FILES_MAX} at most are read"),
            };
            return Err(Error::Read { path: path.to_owned(), error });
        }
        names.sort();
        names
    } else {
        vec![path.to_owned()]
    };
    let mut texts = Vec::new();
    let mut broken = Vec::new();
    for name in names {
        // Bounded by what is read: a pipe or a device has no length to ask for.
        let mut bytes = Vec::new();
        let file = File::open(&name).map_err(|error| failed(&name, error))?;
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| failed(&name, error))?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            let error = format!("is too long, {FILE_BYTES_MAX} bytes at most are read");
            return Err(Error::Read { path: name, error });
        }
        match String::from_utf8(bytes) {
            Ok(text) => texts.push((name, text)),
            Err(error) => {
                let (good, bad) = error.as_bytes().split_at(error.utf8_error().valid_up_to());
                let line = good.iter().filter(|byte| **byte == b'\n').count() + 1;
                let message = format!("is not UTF-8: byte 0x{:02x}; save the file as UTF-8", bad[0]);
                broken.push(at_line(&name, line, message));
            }
        }
    }
    if broken.is_empty() { merge(texts) } else { Err(Error::Invalid(broken)) }
}

fn at_line(file: &Path, line: usize, message: String) -> Located {
    Located { file: file.display().to_string(), line: Some(line), key: String::new(), message }
}

/// Merges texts by top-level key. A key in two of them is a problem that names both.
pub fn merge(texts: Vec<(PathBuf, String)>) -> Result<Files, Error> {
    let mut files = Files::default();
    let mut problems = Problems::default();
    let mut merged = Map::new();
    let mut broken = Vec::new();
    for (number, (name, text)) in texts.into_iter().enumerate() {
        let shown = name.display().to_string();
        files.names.push(name.clone());
        let read = match yaml::parse(&text) {
            Ok(read) => read,
            Err(error) => {
                broken.push(at_line(&name, error.line, error.to_string()));
                continue;
            }
        };
        let entries = match read.value {
            Value::Object(entries) => entries,
            Value::Null => {
                files.warnings.push(format!("{shown}: has no key, so that everything has its default"));
                continue;
            }
            _ => {
                broken.push(at_line(&name, 1, "must be a mapping (`key: value`) at the top".to_owned()));
                continue;
            }
        };
        let mut taken = Vec::new();
        for (key, value) in entries {
            let path = KeyPath::root().key(&key);
            if let Some((other, line)) = files.lines.get(&path) {
                let here = read.lines.get(&path).copied().unwrap_or(1);
                let other = files.names[*other].display();
                problems.add(path, format!("is in two files, {other}:{line} and {shown}:{here}"));
            } else {
                taken.push(path);
                merged.insert(key, value);
            }
        }
        let is_taken = |path: &KeyPath| taken.iter().any(|taken| is_within(path, taken));
        files.problems.extend(read.problems.into_iter().filter(|p| is_taken(&p.path)));
        files.lines.extend(
            read.lines
                .into_iter()
                .filter(|(path, _)| is_taken(path))
                .map(|(path, line)| (path, (number, line))),
        );
    }
    if !broken.is_empty() {
        return Err(Error::Invalid(broken));
    }
    files.problems.extend(problems.into_vec());
    files.value = Value::Object(merged);
    Ok(files)
}

impl Files {
    pub fn names(&self) -> Vec<PathBuf> {
        self.names.clone()
    }

    pub fn places(&self) -> Places {
        let place = |(path, (file, line)): (&KeyPath, &(usize, usize))| {
            let file = self.names[*file].display().to_string();
            (path.clone(), Place { file, line: Some(*line) })
        };
        Places::new(self.lines.iter().map(place))
    }

    /// Returns each problem with its place, in the order of files and lines.
    pub fn locate(&self, problems: Vec<Problem>) -> Vec<Located> {
        let mut placed: Vec<_> =
            problems.into_iter().map(|problem| (self.place(&problem.path), problem)).collect();
        placed.sort_by(|(a, p), (b, q)| (a, &p.path).cmp(&(b, &q.path)));
        placed.dedup();
        placed
            .into_iter()
            .map(|(place, Problem { path, message })| {
                let (file, line) = match place {
                    Some((file, line)) => (self.names.get(file), Some(line)),
                    None => (self.names.first(), None),
                };
                let file = file.map_or("config".to_owned(), |name| name.display().to_string());
                Located { file, line, key: path.as_str().to_owned(), message }
            })
            .collect()
    }

    /// Returns file and line of a key, or those of the nearest enclosing key.
    fn place(&self, path: &KeyPath) -> Option<(usize, usize)> {
        let mut path = path.clone();
        loop {
            if let Some(place) = self.lines.get(&path) {
                return Some(*place);
            }
            path = parent(&path)?;
        }
    }
}

/// Returns whether `path` is `outer` or lies below it.
pub fn is_within(path: &KeyPath, outer: &KeyPath) -> bool {
    path.as_str()
        .strip_prefix(outer.as_str())
        .is_some_and(|rest| outer.as_str().is_empty() || rest.is_empty() || rest.starts_with(['.', '[']))
}

fn parent(path: &KeyPath) -> Option<KeyPath> {
    let end = path.as_str().rfind(['.', '['])?;
    Some(KeyPath::root().key(&path.as_str()[..end]))
}
