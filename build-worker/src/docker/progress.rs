//! BuildKit's progress of a build, as steps and output.

use std::collections::{HashMap, HashSet};

use bollard::moby::buildkit::v1::{StatusResponse, Vertex, VertexLog};
use prost_types::Timestamp;
use proto::dispatch::StepState;

use crate::engine::Progress;

/// Converts a message of the engine. It may hold a step's beginning, its output and its end: they come in this order.
pub(super) fn progress(status: StatusResponse) -> Vec<Progress> {
    let vertexes = in_order_of_dockerfile(status.vertexes);
    let begun = vertexes
        .iter()
        .filter(|vertex| !vertex.cached)
        .cloned()
        .map(|vertex| step(Vertex { completed: None, error: String::new(), ..vertex }));
    let outputs = status.logs.into_iter().map(output);
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

fn output(log: VertexLog) -> Progress {
    const STDERR: i64 = 2;
    Progress::Output {
        step: log.vertex,
        stderr: log.stream == STDERR,
        bytes: log.msg,
        at: log.timestamp.map(|at| Timestamp { seconds: at.seconds, nanos: at.nanos }),
    }
}

/// Orders the vertexes of a message as their Dockerfile has them: first those without inputs, then stage by stage, each after
/// the stages that it copies from. Engines since 23 announce a Dockerfile from its end, with the stages mixed.
fn in_order_of_dockerfile(vertexes: Vec<Vertex>) -> Vec<Vertex> {
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
    let mut order: Vec<&String> = Vec::new();
    let mut stages: Vec<(&str, Vec<&Vertex>)> = Vec::new();
    for digest in &announced {
        let Some(vertex) = first(digest) else { continue };
        match (stage(&vertex.name), vertex.inputs.is_empty()) {
            (Some((name, _)), false) => match stages.iter_mut().find(|(stage, _)| *stage == name) {
                Some((_, members)) => members.push(vertex),
                None => stages.push((name, vec![vertex])),
            },
            (None, _) | (_, true) => order.push(digest),
        }
    }
    let mut placed = HashSet::new();
    for place in 0..stages.len() {
        place_stage(place, &stages, &mut placed, &mut order);
    }
    let order: Vec<String> = order.into_iter().cloned().collect();
    order.iter().filter_map(|digest| updates.remove(digest)).flatten().collect()
}

/// Appends the steps of a stage to `order`, after those of the stages that it has inputs from.
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

/// Returns the stage and the number of a step such as `[builder 2/3] RUN make`.
fn stage(name: &str) -> Option<(&str, u32)> {
    let (label, _) = name.strip_prefix('[')?.split_once(']')?;
    let (stage, numbers) = label.rsplit_once(' ').unwrap_or(("", label));
    let (number, _) = numbers.split_once('/')?;
    Some((stage, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

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
        // As Docker 26.1 announced it.
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
        let ordered = in_order_of_dockerfile(announced);
        let names: Vec<&str> = ordered.iter().map(|vertex| vertex.name.as_str()).collect();
        assert_eq!(
            names,
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
        let ordered = in_order_of_dockerfile(updates);
        assert_eq!(ordered.len(), 4);
        let of_a: Vec<bool> = ordered
            .iter()
            .filter(|vertex| vertex.name == "[1/2] RUN a")
            .map(|vertex| vertex.started.is_some())
            .collect();
        assert_eq!(of_a, [false, true]);
    }
}
