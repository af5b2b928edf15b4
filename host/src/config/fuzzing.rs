//! A target of [`crate::fuzzing`]: what people write.

use super::{Error, files, parse};

/// The text of a config: taken, or everything wrong with it told by its file.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // Files that are data: a plugin's config, a table of devices.
    let _ = crate::yaml::to_json(text);
    let read = files::merge(vec![("headworks.yaml".into(), text.to_owned())]);
    match read.and_then(|files| parse(&files).into_loaded(None, &files)) {
        Err(Error::Invalid(problems)) => {
            assert!(!problems.is_empty());
            assert!(problems.iter().all(|problem| problem.file == "headworks.yaml"), "{problems:?}");
        }
        Err(error) => panic!("{error}"),
        Ok(_) => {}
    }
}
