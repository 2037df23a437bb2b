//! Conversion of BuildKit's progress to steps and output.

use std::collections::{HashMap, HashSet};

use bollard::moby::buildkit::v1::{StatusResponse, Vertex, VertexLog};
use prost_types::Timestamp;
use proto::dispatch::StepState;

use super::clips::Clips;
use crate::engine::Progress;

/// Converts a progress message of the engine.
///
/// A message may hold a step's start, output and end; they are returned in this order. `names` are the stages
/// of the Dockerfile, as far as they are known; `clips` has seen the messages before.
pub(super) fn progress(status: StatusResponse, names: &[String], clips: &mut Clips) -> Vec<Progress> {
    let vertexes = in_order_of_dockerfile(status.vertexes, names);
    vertexes.iter().for_each(|vertex| clips.note(vertex));
    let begun = vertexes
        .iter()
        .filter(|vertex| !vertex.cached)
        .cloned()
        .map(|vertex| step(Vertex { completed: None, error: String::new(), ..vertex }));
    let outputs: Vec<Progress> = status.logs.into_iter().flat_map(|log| output(log, clips)).collect();
    let ended = vertexes.iter().filter(|vertex| vertex.cached || vertex.completed.is_some());
    begun.chain(outputs).chain(ended.cloned().map(step)).collect()
}

fn step(vertex: Vertex) -> Progress {
    let (state, at) = if !vertex.error.is_empty() {
        (StepState::Failed, vertex.completed)
    } else if vertex.cached {
        (StepState::Cached, vertex.completed)
    } else if vertex.completed.is_some() {
        (StepState::Done, vertex.completed)
    } else if vertex.started.is_some() {
        (StepState::Started, vertex.started)
    } else {
        (StepState::Pending, None)
    };
    Progress::Step {
        id: vertex.digest,
        name: vertex.name,
        state,
        error: vertex.error,
        at: at.map(|at| Timestamp { seconds: at.seconds, nanos: at.nanos }),
    }
}

/// Converts a chunk of output, and the engine's message that may be at its end.
fn output(log: VertexLog, clips: &mut Clips) -> Vec<Progress> {
    const STDERR: i64 = 2;
    let VertexLog { vertex, stream, msg, timestamp } = log;
    let at = timestamp.map(|at| Timestamp { seconds: at.seconds, nanos: at.nanos });
    let stderr = stream == STDERR;
    let (bytes, message) = clips.split(&vertex, stream, &msg);
    let clip = message.map(|message| Progress::Clip {
        step: vertex.clone(),
        stderr,
        message: message.to_owned(),
        at,
    });
    let bytes = bytes.to_vec();
    let output = (!bytes.is_empty()).then_some(Progress::Output { step: vertex, stderr, bytes, at });
    output.into_iter().chain(clip).collect()
}

/// Sorts the vertexes of a message in the order of their Dockerfile.
///
/// The engine's own come first, then those without inputs, then stage by stage; a stage of unknown position
/// follows the stages that it copies from. Engines since 23 announce a Dockerfile from its end, with the
/// stages mixed.
fn in_order_of_dockerfile(vertexes: Vec<Vertex>, names: &[String]) -> Vec<Vertex> {
    let mut updates: HashMap<String, Vec<Vertex>> = HashMap::new();
    let mut announced = Vec::new();
    for vertex in vertexes {
        let updates = updates.entry(vertex.digest.clone()).or_insert_with(|| {
            announced.push(vertex.digest.clone());
            Vec::new()
        });
        updates.push(vertex);
    }
    let first = |digest: &String| updates.get(digest).and_then(|updates| updates.first());
    let (mut order, mut sources, mut others) = (Vec::new(), Vec::new(), Vec::new());
    let mut stages: Vec<(&str, Vec<&Vertex>)> = Vec::new();
    for digest in &announced {
        let Some(vertex) = first(digest) else { continue };
        match (stage(&vertex.name), vertex.inputs.is_empty()) {
            (Some((name, _)), false) => match stages.iter_mut().find(|(stage, _)| *stage == name) {
                Some((_, members)) => members.push(vertex),
                None => stages.push((name, vec![vertex])),
            },
            (Some(_), true) => sources.push(digest),
            (None, _) if vertex.name.starts_with("[internal]") => order.push(digest),
            (None, _) => others.push(digest),
        }
    }
    let rank = |stage: &str| names.iter().position(|name| name == stage).unwrap_or(names.len());
    sources.sort_by_key(|digest| {
        first(digest).and_then(|vertex| stage(&vertex.name)).map(|(name, _)| rank(name))
    });
    order.append(&mut sources);
    // Unknown stages come last, each after the stages that it copies from.
    stages.sort_by_key(|(name, _)| rank(name));
    let mut placed = HashSet::new();
    for place in 0..stages.len() {
        place_stage(place, &stages, &mut placed, &mut order);
    }
    order.append(&mut others);
    let order: Vec<String> = order.into_iter().cloned().collect();
    order.iter().filter_map(|digest| updates.remove(digest)).flatten().collect()
}

/// Appends the steps of a stage to `order`, after the stages that it has inputs from.
fn place_stage<'a>(
    place: usize,
    stages: &[(&str, Vec<&'a Vertex>)],
    placed: &mut HashSet<usize>,
    order: &mut Vec<&'a String>,
) {
    if !placed.insert(place) {
        return;
    }
    let Some((_, members)) = stages.get(place) else { return };
    let mut members = members.clone();
    members.sort_by_key(|vertex| stage(&vertex.name).map(|(_, number)| number));
    for input in members.iter().flat_map(|vertex| &vertex.inputs) {
        let of_input =
            |(_, members): &(&str, Vec<&Vertex>)| members.iter().any(|vertex| vertex.digest == *input);
        if let Some(of_input) = stages.iter().position(of_input) {
            place_stage(of_input, stages, placed, order);
        }
    }
    order.extend(members.iter().map(|vertex| &vertex.digest));
}

/// Parses the stage and the number of a step such as `[builder 2/3] RUN make`.
fn stage(name: &str) -> Option<(&str, u32)> {
    let (label, _) = name.strip_prefix('[')?.split_once(']')?;
    let (stage, numbers) = label.rsplit_once(' ').unwrap_or(("", label));
    let (number, _) = numbers.split_once('/')?;
    Some((stage, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ordered(vertexes: Vec<Vertex>, names: &[&str]) -> Vec<String> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        in_order_of_dockerfile(vertexes, &names).into_iter().map(|vertex| vertex.name).collect()
    }

    fn vertex(name: &str, inputs: &[&str]) -> Vertex {
        Vertex {
            digest: name.to_owned(),
            name: name.to_owned(),
            inputs: inputs.iter().map(|&input| input.to_owned()).collect(),
            ..Vertex::default()
        }
    }

    #[test]
    fn steps_come_in_the_order_of_their_dockerfile() {
        // The order in which Docker 26.1 announced the steps.
        let announced = vec![
            vertex("[stage-2 5/5] RUN echo c2", &["[stage-2 4/5] RUN echo c1"]),
            vertex("[stage-2 4/5] RUN echo c1", &["[stage-2 3/5] COPY --from=b"]),
            vertex("[stage-2 3/5] COPY --from=b", &["[stage-2 2/5] COPY --from=a", "[b 2/2] RUN echo b1"]),
            vertex("[b 2/2] RUN echo b1", &["[a 1/3] FROM base"]),
            vertex("[stage-2 2/5] COPY --from=a", &["[a 1/3] FROM base", "[a 3/3] RUN echo a2"]),
            vertex("[a 3/3] RUN echo a2", &["[a 2/3] RUN echo a1"]),
            vertex("[a 2/3] RUN echo a1", &["[a 1/3] FROM base"]),
            vertex("[a 1/3] FROM base", &[]),
        ];
        assert_eq!(
            ordered(announced, &[]),
            [
                "[a 1/3] FROM base",
                "[a 2/3] RUN echo a1",
                "[a 3/3] RUN echo a2",
                "[b 2/2] RUN echo b1",
                "[stage-2 2/5] COPY --from=a",
                "[stage-2 3/5] COPY --from=b",
                "[stage-2 4/5] RUN echo c1",
                "[stage-2 5/5] RUN echo c2",
            ]
        );
    }

    #[test]
    fn stages_that_nothing_relates_come_in_the_order_of_their_dockerfile() {
        let announced = || {
            vec![
                vertex("[last 1/2] FROM base", &[]),
                vertex("[last 2/2] COPY --from=second", &["[last 1/2] FROM base", "[second 2/2] RUN b"]),
                vertex("[second 2/2] RUN b", &["[last 1/2] FROM base"]),
                vertex("[stage-0 2/2] RUN a", &["[last 1/2] FROM base"]),
                vertex("[internal] load metadata", &[]),
            ]
        };
        let expected = |runs: [&str; 2]| {
            let [first, second] = runs;
            [
                "[internal] load metadata",
                "[last 1/2] FROM base",
                first,
                second,
                "[last 2/2] COPY --from=second",
            ]
            .map(str::to_owned)
        };
        let [a, b] = ["[stage-0 2/2] RUN a", "[second 2/2] RUN b"];
        assert_eq!(ordered(announced(), &["stage-0", "second", "last"]), expected([a, b]));
        assert_eq!(ordered(announced(), &["second", "stage-0", "last"]), expected([b, a]));
    }

    #[test]
    fn every_update_of_a_step_is_kept_and_a_circle_of_inputs_ends() {
        let started = |name: &str, inputs: &[&str]| Vertex {
            started: Some(Default::default()),
            ..vertex(name, inputs)
        };
        let updates = vec![
            vertex("[1/2] RUN a", &["[b 2/2] RUN b"]),
            started("[1/2] RUN a", &["[b 2/2] RUN b"]),
            vertex("[b 2/2] RUN b", &["[1/2] RUN a"]),
            vertex("exporting to image", &[]),
        ];
        let ordered = in_order_of_dockerfile(updates, &[]);
        assert_eq!(ordered.len(), 4);
        let of_a: Vec<bool> = ordered
            .iter()
            .filter(|vertex| vertex.name == "[1/2] RUN a")
            .map(|vertex| vertex.started.is_some())
            .collect();
        assert_eq!(of_a, [false, true]);
    }
}
