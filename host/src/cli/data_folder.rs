//! The data folder as a command sees it: present, missing, or not readable by this user. The host makes
//! the folder readable only for its own user, and commands are often run by others, such as a monitoring
//! agent.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::output::shown;
use crate::config::Config;
use crate::files::found;

/// Returns whether the path is a readable folder. Fails if this user may not read it.
pub fn is_there(folder: &Path) -> io::Result<bool> {
    Ok(found(std::fs::read_dir(folder))?.is_some())
}

/// Returns whether there is a data folder. Fails if this user may not read it, because nothing is then
/// known about the host.
pub fn look(config: &Config) -> anyhow::Result<bool> {
    is_there(&config.data_dir).map_err(|error| refused(config, &error))
}

/// Returns the error for a data folder that cannot be read.
pub fn refused(config: &Config, error: &io::Error) -> anyhow::Error {
    let folder = &config.data_dir;
    let owner = std::fs::metadata(folder).map(|data| format!(" (uid {})", data.uid())).unwrap_or_default();
    anyhow::anyhow!(
        "cannot read the data folder {}: {error}; ask as the user of the host{owner}",
        shown(folder)
    )
}

#[cfg(test)]
mod tests {
    use super::super::admin_client::{self, NotRunning};
    use super::super::streams;
    use super::*;
    use crate::batch::Offset;
    use crate::config::DEAD_LETTERS;

    /// A loop of links stands for a folder of another user: root may read everything else.
    #[tokio::test]
    async fn nothing_is_said_of_a_data_folder_that_cannot_be_read_but_that() {
        let folder = tempfile::tempdir().unwrap();
        let (file, data_dir) = (folder.path().join("headworks.yaml"), folder.path().join("data"));
        std::fs::write(&file, format!("data_dir: {}\n", data_dir.display())).unwrap();
        let config = crate::config::load(Some(&file)).unwrap().config;
        let asked =
            async || admin_client::get::<serde_json::Value>(&config, "/api/status").await.unwrap_err();
        let open = || streams::open(&config, DEAD_LETTERS, Offset(0));
        assert!(asked().await.is::<NotRunning>());
        assert!(open().unwrap().is_none() && !look(&config).unwrap());
        assert!(
            streams::must_be_there(&config).unwrap_err().to_string().starts_with("there is no data folder")
        );

        std::os::unix::fs::symlink("data", &data_dir).unwrap();
        let errors = [
            asked().await,
            open().err().unwrap(),
            look(&config).unwrap_err(),
            streams::must_be_there(&config).unwrap_err(),
        ];
        for error in errors {
            assert!(error.to_string().starts_with("cannot read the data folder"), "{error}");
            assert!(error.to_string().ends_with("ask as the user of the host"), "{error}");
        }
    }
}
