//! The server's own COPY of the rows that a table has, from files of one batch each: what
//! PostgreSQL does with these rows at most, on one connection.

use std::process::Command;
use std::time::{Duration, Instant};

use headworks_tests::folder::Folder;
use headworks_tests::postgres::Database;
use headworks_tests::process::run;

pub struct ServerCopy {
    folder: Folder,
    batches: u64,
    batch_rows: u64,
}

impl ServerCopy {
    pub fn new(name: &str, batches: u64, batch_rows: u64) -> Self {
        let folder = Folder::new(name);
        // The server's user writes and reads files here.
        run(Command::new("chmod").arg("777").arg(folder.path()));
        Self { folder, batches, batch_rows }
    }

    /// Takes the rows of table `telemetry`, in the order that they have.
    pub fn take(&self, database: &mut Database) {
        for (number, file) in self.files() {
            let (skipped, rows) = (number * self.batch_rows, self.batch_rows);
            database.execute(&format!(
                "COPY (SELECT * FROM telemetry OFFSET {skipped} LIMIT {rows}) TO '{file}' (FORMAT binary)"
            ));
        }
    }

    /// Writes the rows to table `telemetry`, a transaction for each batch.
    pub fn write(&self, database: &mut Database) -> Duration {
        let begin = Instant::now();
        for (_, file) in self.files() {
            database.execute(&format!("COPY telemetry FROM '{file}' (FORMAT binary)"));
        }
        begin.elapsed()
    }

    fn files(&self) -> impl Iterator<Item = (u64, String)> {
        let file = |number| self.folder.join(format!("{number}.copy")).display().to_string();
        (0..self.batches).map(move |number| (number, file(number)))
    }
}
