//! What a sink stores about the passes of redrives.

use uuid::Uuid;

use super::{Database, advance, claim, message, opened, position, rejected, rows};
use crate::batch::{Offset, Partition};
use crate::sinks::{Advance, Claim, PassPosition, Position, Rows};
use crate::stream::Lineage;

pub async fn positions_in_other_logs_are_told_and_not_taken(database: &dyn Database) {
    let of = |log: u128, sink: &str| Claim {
        log: Uuid::from_u128(log),
        sink: sink.to_owned(),
        partitions: 2,
        ..claim()
    };
    let mut sinks = Vec::new();
    for (log, sink, next) in [(1, "warehouse", 7), (2, "former", 9), (3, "other", 5)] {
        let (mut opened, _) = opened(database, &of(log, sink)).await;
        let moved = [advance(0, 0, next), advance(1, 0, next + 1)];
        opened.commit(&Rows::default(), &moved).await.expect("commits");
        sinks.push(opened);
    }
    // A claim that moved nothing has no positions.
    drop(opened(database, &of(4, "warehouse")).await);
    let (mut sink, _) = opened(database, &claim()).await;
    let claims = ["warehouse", "former"].map(|sink| ("telemetry".to_owned(), sink.to_owned()));
    let logs = [1, 2, 3, 4, 5].map(Uuid::from_u128);
    let mut told = sink.positions_of(&claims, &logs).await.expect("answers");
    told.sort();
    let at = |log, partition, next| (Uuid::from_u128(log), Partition(partition), Offset(next));
    assert_eq!(told, [at(1, 0, 7), at(1, 1, 8), at(2, 0, 9), at(2, 1, 10)]);
    assert_eq!(sink.positions_of(&claims, &logs[2..]).await.expect("answers"), []);
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("the claim stands");
    sinks[0].commit(&Rows::default(), &[advance(0, 7, 8)]).await.expect("nothing was taken");
}

/// The records of passes are written with the rows, or not at all, and stay until they are replaced.
pub async fn letters_of_passes_are_kept_with_their_rows(database: &dyn Database) {
    let pass = |pass: u128, sink: &str| Claim {
        pipeline: "telemetry/redrive".to_owned(),
        log: Uuid::from_u128(pass),
        sink: sink.to_owned(),
        ..claim()
    };
    let log = Uuid::from_u128(77);
    let with = |from, to, letters: &str| Advance {
        letters: Some(format!("{log} {letters}")),
        lineage: Some(Lineage::read(Some("00000000000000aa")).expect("reads")),
        ..advance(0, from, to)
    };
    for (number, sink, letters) in [(1, "warehouse", "3-5"), (2, "former", "9"), (3, "other", "1")] {
        let (mut opened, _) = opened(database, &pass(number, sink)).await;
        opened.commit(&rows([message("a", "1")]), &[with(0, 6, letters)]).await.expect("commits");
        opened.commit(&Rows::default(), &[advance(0, 6, 7)]).await.expect("commits");
    }
    let (mut unfinished, _) = opened(database, &pass(4, "warehouse")).await;
    unfinished.commit(&Rows::default(), &[advance(0, 0, 9)]).await.expect("commits");
    database.refuses("\"hot\"");
    let refused = rows([message("a", "\"hot\""), message("a", "3")]);
    drop(rejected(unfinished.commit(&refused, &[with(9, 12, "10-11")]).await));
    drop(unfinished);
    let (mut finished, _) = opened(database, &pass(5, "warehouse")).await;
    finished.commit(&Rows::default(), &[advance(0, 0, 9)]).await.expect("commits");
    drop(rejected(finished.commit(&refused, &[with(9, 12, "10-11")]).await));
    finished.set_letters(&[(Partition(0), format!("{log} 11"))]).await.expect("the transaction waits");
    finished.finish().await.expect("commits");
    let (mut sink, _) = opened(database, &claim()).await;
    let names = ["warehouse", "former"].map(|sink| ("telemetry/redrive".to_owned(), sink.to_owned()));
    let mut told = sink.passes_of(&names, log, Offset(6)).await.expect("answers");
    told.sort_by_key(|told| told.pass);
    let at = |pass, next, letters: &str| PassPosition {
        pass: Uuid::from_u128(pass),
        position: Position {
            lineage: Lineage::read(Some("00000000000000aa")).expect("reads"),
            ..position(0, next)
        },
        letters: format!("{log} {letters}"),
    };
    assert_eq!(told, [at(1, 7, "3-5"), at(2, 7, "9"), at(5, 12, "11")]);
    assert_eq!(sink.passes_of(&names, log, Offset(12)).await.expect("answers"), []);
    assert_eq!(sink.passes_of(&names, Uuid::from_u128(78), Offset(0)).await.expect("answers"), []);
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("the claim stands");
}
