//! Dead letters of sinks that have other names by now.

use super::harness::{Act, World, chain, published, sorted, step, text};
use crate::batch::Offset;
use crate::pipeline::{Filter, list_open};

/// The same databases under other names: name, the name that it had at first, and `renamed_from`.
fn named(world: &World, sinks: &[(&str, &str, Option<&str>)]) -> World {
    let names = sinks.iter().map(|(name, _, _)| *name).collect::<Vec<_>>().join(" ");
    let own =
        |(name, first, _): &(&str, &str, Option<&str>)| ((*name).to_owned(), world.database(first).clone());
    let former =
        |(name, _, former): &(&str, &str, Option<&str>)| Some(((*name).to_owned(), (*former)?.to_owned()));
    World {
        config: World::new(1, &[("default", &names)]).config,
        databases: sinks.iter().map(own).collect(),
        renamed_from: sinks.iter().filter_map(former).collect(),
        ..world.clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_goes_to_the_sink_that_rejected_it_whatever_the_names_are_by_then() {
    let world = World::new(1, &[("default", "w v new")]);
    world.database("w").refuse(|message| text(message).ends_with('7').then(|| "no column".to_owned()));
    let steps = |rejects: bool| {
        let check = step("check", move |message, _| match rejects && text(message).ends_with('3') {
            true => Act::Refuse("no".to_owned()),
            false => Act::Pass,
        });
        chain(1, &[check])
    };
    let started = async |world: &World, rejects| {
        let process = world.start(steps(rejects)).await;
        process.until("steps", |status| status.chain.is_some()).await;
        process
    };
    let generations = [
        named(&world, &[("w", "w", None), ("v", "v", None)]),
        named(&world, &[("x", "w", Some("w")), ("v", "v", None)]),
        named(&world, &[("x", "w", None), ("w", "v", Some("v"))]),
        // The former name of a sink is that of a new one, which is written all from the beginning.
        named(&world, &[("y", "w", Some("x")), ("w", "v", None), ("v", "new", None)]),
    ];
    for (world, from) in generations.iter().zip([0, 10, 20, 30]) {
        let process = started(world, true).await;
        world.publish_many(1, from, 10);
        process.drained().await;
        process.stop().await;
    }
    world.database("w").refuse(|_| None);
    let last = &generations[3];
    let process = started(last, false).await;
    process.drained().await;
    let by = |sink: &str| Filter { sink: Some(sink.to_owned()), ..Filter::default() };
    for sink in ["w", "v"] {
        assert_eq!(process.handle.redrive(&by(sink)).await.unwrap().sent, 0, "it rejected none: {sink}");
        assert_eq!(process.handle.discard(&by(sink), None).await.unwrap(), Some(0), "{sink}");
    }
    let one = Filter { ids: Some(vec![letter_of(&world, "d0:17").await]), ..by("y") };
    assert_eq!(process.handle.redrive(&one).await.unwrap().sent, 1);
    // Nobody else has this former name.
    assert_eq!(process.handle.redrive(&by("x")).await.unwrap().sent, 3);
    process.handle.redrive(&Filter::default()).await.unwrap();
    assert!(list_open(&*world.dead, None).await.unwrap().is_empty());
    process.stop().await;
    for database in ["w", "v", "new"] {
        assert_eq!(sorted(world.payloads(database)), published(1, 40), "{database}");
    }
}

/// The letter of a sink that rejected this message.
async fn letter_of(world: &World, payload: &str) -> Offset {
    let letters = world.letters().await;
    Offset(letters.iter().position(|(text, _)| text == payload).expect("it was rejected") as u64)
}
