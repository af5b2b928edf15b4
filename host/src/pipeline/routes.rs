//! From the route that a step gave a message to the sinks that take it.

use super::config::{Config, DEFAULT_ROUTE};
use crate::batch::{Batch, Entry, Offset, Span};

/// A sink by its place in the pipeline's list.
pub type SinkNumber = usize;

pub struct Routes {
    /// By name; the default first.
    routes: Vec<(String, Vec<SinkNumber>)>,
}

/// What the routes of a pipeline led to when its steps gave them: in a stream that the steps wrote messages lie that are
/// older than the config.
pub struct RouteTables(Vec<(Offset, Routes)>);

impl RouteTables {
    /// `earlier`: oldest first, each with the first offset that it is for; `now` is for all behind them.
    pub fn new(earlier: Vec<(Offset, Routes)>, now: (Offset, Routes)) -> Self {
        let mut tables = earlier;
        tables.push(now);
        Self(tables)
    }

    /// The routes of the config.
    pub fn now(&self) -> &Routes {
        &self.0[self.0.len() - 1].1
    }

    /// The routes of a message. The oldest are for all that lie before them, too.
    pub fn of(&self, message: Offset) -> &Routes {
        let later = self.0.partition_point(|(from, _)| *from <= message);
        &self.0[later.saturating_sub(1)].1
    }

    /// Returns from where on other routes are for messages behind this one.
    pub fn end_of(&self, message: Offset) -> Option<Offset> {
        let later = self.0.partition_point(|(from, _)| *from <= message).max(1);
        self.0.get(later).map(|(from, _)| *from)
    }
}

/// A batch and which of its entries each sink takes.
pub struct Sorted {
    pub batch: Batch,
    /// Entries whose route nobody knows.
    pub unknown: Vec<usize>,
    to: To,
}

enum To {
    /// All entries took the same route.
    All(Vec<SinkNumber>),
    /// Per entry: the place of its route, or `None`.
    Each(Vec<Option<usize>>, Vec<Vec<SinkNumber>>),
}

impl Routes {
    /// `sinks`: the pipeline's list. A sink that is not in it takes nothing:
    /// the config's check is where that is said.
    pub fn new(config: &Config, sinks: &[String]) -> Self {
        let number = |name: &String| sinks.iter().position(|sink| sink == name);
        let to = |target| config.targets(target).filter_map(number).collect();
        Self::of(config.routes.iter().map(|(route, target)| (route.clone(), to(target))))
    }

    /// Returns the routes of a table of names and sinks.
    pub fn of(table: impl Iterator<Item = (String, Vec<SinkNumber>)>) -> Self {
        let mut routes: Vec<_> = table.collect();
        routes.sort_by_key(|(route, _): &(String, Vec<_>)| route != DEFAULT_ROUTE);
        Self { routes }
    }

    /// Lets a sink take what any other takes.
    pub fn with_all_to(mut self, sink: Option<SinkNumber>) -> Self {
        for (_, sinks) in self.routes.iter_mut().filter(|(_, sinks)| !sinks.is_empty()) {
            sinks.extend(sink);
        }
        self
    }

    pub fn sort(&self, batch: Batch) -> Sorted {
        let mut places = Vec::new();
        let mut unknown = Vec::new();
        let mut last: (&str, Option<usize>) = ("", self.place(""));
        let mut same = true;
        for i in 0..batch.len() {
            let route = batch.message(i).route();
            if route != last.0 {
                if same && i > 0 {
                    places = vec![last.1; i];
                    same = false;
                }
                last = (route, self.place(route));
            }
            if !same {
                places.push(last.1);
            }
            if last.1.is_none() {
                unknown.push(i);
            }
        }
        let to = if same {
            To::All(last.1.map(|place| self.routes[place].1.clone()).unwrap_or_default())
        } else {
            To::Each(places, self.routes.iter().map(|(_, sinks)| sinks.clone()).collect())
        };
        Sorted { batch, unknown, to }
    }

    /// Returns whether the pipeline has the routes of all messages of a batch.
    pub fn are_known(&self, batch: &Batch) -> bool {
        let mut last_known = None;
        batch.messages().all(|message| {
            let route = Some(message.route());
            if route != last_known {
                last_known = route.filter(|route| self.place(route).is_some());
            }
            route == last_known
        })
    }

    /// `route "fast" is not one of this pipeline's routes: alert, default; step "check" gave it`.
    /// `giver`: the step that gave the message the route.
    pub fn unknown_reason(&self, route: &str, giver: Option<&str>) -> String {
        let mut known: Vec<_> = self.routes.iter().map(|(route, _)| route.as_str()).collect();
        known.sort_unstable();
        let known = known.join(", ");
        let by = giver.map(|step| format!("; step \"{step}\" gave it")).unwrap_or_default();
        format!("route \"{route}\" is not one of this pipeline's routes: {known}{by}")
    }

    /// Takes routes away that this pipeline does not have. A message of a stream that another pipeline writes
    /// has the route that it had there.
    pub fn without_unknown(&self, batch: &mut Batch) {
        let is_unknown =
            |entry: &Entry| !entry.route.is_empty() && self.place(batch.text(entry.route)).is_none();
        let unknown: Vec<_> = (0..batch.len()).filter(|i| is_unknown(&batch.entries[*i])).collect();
        if unknown.is_empty() {
            return;
        }
        let entries = batch.entries.to_mut();
        unknown.into_iter().for_each(|i| entries[i].route = Span::EMPTY);
        // Their bytes hold what the messages do not have any more.
        batch.exclusive = false;
    }

    fn place(&self, route: &str) -> Option<usize> {
        let route = if route.is_empty() { DEFAULT_ROUTE } else { route };
        self.routes.iter().position(|(name, _)| name == route)
    }
}

impl Sorted {
    /// Returns for each entry the sinks that take it.
    pub fn sinks(&self) -> impl Iterator<Item = &[SinkNumber]> {
        (0..self.batch.len()).map(|i| match &self.to {
            To::All(sinks) => &sinks[..],
            To::Each(places, routes) => places[i].map_or(&[][..], |place| &routes[place]),
        })
    }

    /// The entries that a sink takes, in order.
    pub fn for_sink(&self, sink: SinkNumber) -> Option<Batch> {
        match &self.to {
            To::All(sinks) => sinks.contains(&sink).then(|| self.batch.clone()),
            To::Each(places, routes) => {
                let mut place = places.iter();
                let batch = self.batch.filtered(|_| {
                    place.next().is_some_and(|place| place.is_some_and(|place| routes[place].contains(&sink)))
                });
                (!batch.is_empty()).then_some(batch)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::config::RouteTarget;

    fn routes() -> Routes {
        let target = |names: &[&str]| RouteTarget::Several(names.iter().map(|n| (*n).to_owned()).collect());
        let config = Config {
            routes: [
                ("default".to_owned(), target(&["w"])),
                ("alert".to_owned(), target(&["w", "a"])),
                ("noise".to_owned(), target(&["drop"])),
            ]
            .into(),
            ..Config::default()
        };
        Routes::new(&config, &["w".to_owned(), "a".to_owned()])
    }

    fn batch(routes: &[&str]) -> Batch {
        let mut bytes = Vec::new();
        let mut entries = Vec::new();
        for (i, route) in routes.iter().enumerate() {
            let span = Span::new(0, bytes.len(), route.len());
            bytes.extend_from_slice(route.as_bytes());
            entries.push(Entry { offset: i as u32, route: span, ..Entry::default() });
        }
        Batch { segments: vec![bytes.into()], entries: entries.into(), ..Batch::default() }
    }

    fn taken(sorted: &Sorted, sink: usize) -> Vec<u32> {
        sorted.for_sink(sink).map_or(Vec::new(), |batch| batch.entries.iter().map(|e| e.offset).collect())
    }

    #[test]
    fn each_sink_takes_what_its_routes_bring() {
        let sorted = routes().sort(batch(&["", "alert", "noise", "default", "what"]));
        assert_eq!(taken(&sorted, 0), [0, 1, 3]);
        assert_eq!(taken(&sorted, 1), [1]);
        assert_eq!(sorted.unknown, [4]);
        let sinks: Vec<&[SinkNumber]> = vec![&[0], &[0, 1], &[], &[0], &[]];
        assert_eq!(sorted.sinks().collect::<Vec<_>>(), sinks);
        let are_known = |of: &[&str]| routes().are_known(&batch(of));
        assert!(are_known(&[]) && are_known(&["", "alert", "alert", "noise", ""]));
        assert!(!are_known(&["what", "what"]) && !are_known(&["", "alert", "what", ""]));
    }

    #[test]
    fn a_batch_of_one_route_goes_as_it_is() {
        let sorted = routes().sort(batch(&["alert", "alert"]));
        assert_eq!((taken(&sorted, 0), taken(&sorted, 1)), (vec![0, 1], vec![0, 1]));
        assert_eq!(sorted.sinks().collect::<Vec<_>>(), [[0, 1], [0, 1]]);
        let sorted = routes().sort(batch(&["what", "what"]));
        assert_eq!((taken(&sorted, 0), sorted.unknown), (vec![], vec![0, 1]));
    }

    #[test]
    fn a_route_that_the_pipeline_does_not_have_is_taken_from_what_it_reads() {
        let mut batch = batch(&["", "alert", "what", "default"]);
        batch.exclusive = true;
        routes().without_unknown(&mut batch);
        assert_eq!(
            batch.messages().map(|message| message.route()).collect::<Vec<_>>(),
            ["", "alert", "", "default"]
        );
        assert!(!batch.exclusive, "no step sees the name");
    }

    #[test]
    fn messages_go_by_the_routes_of_their_time() {
        let to = |sink| Routes::of(std::iter::once(("default".to_owned(), vec![sink])));
        let tables = RouteTables::new(vec![(Offset(5), to(0)), (Offset(9), to(1))], (Offset(20), to(2)));
        let of = |offset| taken_by(tables.of(Offset(offset)));
        assert_eq!([0, 5, 8, 9, 19, 20, 90].map(of), [0, 0, 0, 1, 1, 2, 2]);
        let end_of = |offset| tables.end_of(Offset(offset)).map(|end| end.0);
        assert_eq!([0, 8, 9, 20].map(end_of), [Some(9), Some(9), Some(20), None]);
        let only = RouteTables::new(Vec::new(), (Offset(0), to(3)));
        assert_eq!((taken_by(only.of(Offset(7))), only.end_of(Offset(7))), (3, None));
    }

    fn taken_by(routes: &Routes) -> SinkNumber {
        routes.routes[0].1[0]
    }

    #[test]
    fn an_unknown_route_is_told_with_the_known_ones() {
        let told = "route \"fast\" is not one of this pipeline's routes: alert, default, noise";
        assert_eq!(routes().unknown_reason("fast", None), told);
        assert_eq!(routes().unknown_reason("fast", Some("check")), format!("{told}; step \"check\" gave it"));
    }
}
