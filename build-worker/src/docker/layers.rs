//! Progress of a pull or a push, as steps and output.
//!
//! There is one step for the whole transfer, and one for each named layer.

use std::collections::BTreeMap;

use bollard::models::ProgressDetail;
use proto::dispatch::StepState;

use crate::engine::Progress;

/// The progress of one image transfer.
#[derive(Debug)]
pub(super) struct Layers {
    /// Name of the step for the whole transfer.
    name: String,
    reported: BTreeMap<String, Layer>,
}

/// The last reported state of a layer.
#[derive(Debug)]
struct Layer {
    status: String,
    /// Completed tenths of the layer.
    tenths: i64,
    is_over: bool,
}

impl Layers {
    const WHOLE: &str = "whole";

    pub(super) fn new(name: String) -> Self {
        Self { name, reported: BTreeMap::new() }
    }

    pub(super) fn begun(&self) -> Vec<Progress> {
        vec![self.whole(StepState::Started, String::new())]
    }

    /// Ends the layers whose end the engine has not reported, and then the whole transfer.
    pub(super) fn succeeded(&self) -> Vec<Progress> {
        let unfinished = self.reported.iter().filter(|(_, layer)| !layer.is_over);
        let layers = unfinished.map(|(layer, _)| self.layer(layer, StepState::Done));
        layers.chain([self.whole(StepState::Done, String::new())]).collect()
    }

    pub(super) fn failed(&self, error: String) -> Vec<Progress> {
        vec![self.whole(StepState::Failed, error)]
    }

    /// Converts a message of the engine.
    pub(super) fn convert(
        &mut self,
        id: Option<String>,
        status: Option<String>,
        detail: Option<ProgressDetail>,
    ) -> Vec<Progress> {
        let Some(status) = status else { return Vec::new() };
        // In this message the ID is the tag, not a layer.
        let layer = id.filter(|_| !status.starts_with("Pulling from"));
        let Some(layer) = layer else {
            let is_of_some_layer = detail.is_some() || matches!(status.as_str(), "Preparing" | "Waiting");
            return if is_of_some_layer { Vec::new() } else { vec![self.line(Self::WHOLE, &status)] };
        };
        let state = match status.as_str() {
            "Pulling fs layer" | "Waiting" => StepState::Pending,
            "Pull complete" => StepState::Done,
            "Already exists" => StepState::Cached,
            _ => StepState::Started,
        };
        let mut progress = Vec::new();
        if !self.reported.contains_key(&layer) || state != StepState::Pending {
            progress.push(self.layer(&layer, state));
        }
        let size =
            detail.and_then(|detail| Some((detail.current?, detail.total.filter(|&total| total > 0)?)));
        let tenths = size.map_or(0, |(current, total)| current.saturating_mul(10) / total);
        if self.reported.get(&layer).is_none_or(|last| last.status != status || last.tenths < tenths) {
            let text = match size {
                Some((_, total)) => format!("{status} {} % of {total} bytes", tenths * 10),
                None => status.clone(),
            };
            // The line precedes the step's end.
            progress.insert(0, self.line(&layer, &text));
            let is_over = matches!(state, StepState::Done | StepState::Cached);
            self.reported.insert(layer, Layer { status, tenths, is_over });
        }
        progress
    }

    fn whole(&self, state: StepState, error: String) -> Progress {
        self.step(Self::WHOLE, self.name.clone(), state, error)
    }

    fn layer(&self, layer: &str, state: StepState) -> Progress {
        self.step(layer, format!("layer {layer}"), state, String::new())
    }

    fn step(&self, part: &str, name: String, state: StepState, error: String) -> Progress {
        Progress::Step { id: self.id(part), name, state, error, at: None }
    }

    fn line(&self, part: &str, text: &str) -> Progress {
        Progress::Output {
            step: self.id(part),
            stderr: false,
            bytes: format!("{text}\n").into_bytes(),
            at: None,
        }
    }

    /// Returns the ID of a step; a build may transfer several images.
    fn id(&self, part: &str) -> String {
        format!("{}: {part}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(progress: Vec<Progress>) -> Vec<String> {
        progress
            .into_iter()
            .map(|progress| match progress {
                Progress::Step { name, state, .. } => format!("{name}: {state:?}"),
                Progress::Output { bytes, .. } => String::from_utf8_lossy(&bytes).trim_end().to_owned(),
                Progress::Clip { message, .. } => message,
            })
            .collect()
    }

    #[test]
    fn a_layer_reports_each_tenth_once() {
        let mut layers = Layers::new("pull x".to_owned());
        let mut hear = |status: &str, size: Option<(i64, i64)>| {
            let detail =
                size.map(|(current, total)| ProgressDetail { current: Some(current), total: Some(total) });
            texts(layers.convert(Some("abc".to_owned()), Some(status.to_owned()), detail))
        };
        assert_eq!(hear("Pulling from x", None), ["Pulling from x"]);
        assert_eq!(hear("Pulling fs layer", None), ["Pulling fs layer", "layer abc: Pending"]);
        assert_eq!(
            hear("Downloading", Some((1, 100))),
            ["Downloading 0 % of 100 bytes", "layer abc: Started"]
        );
        assert_eq!(hear("Downloading", Some((9, 100))), ["layer abc: Started"]);
        assert_eq!(
            hear("Downloading", Some((11, 100))),
            ["Downloading 10 % of 100 bytes", "layer abc: Started"]
        );
        assert_eq!(hear("Pull complete", None), ["Pull complete", "layer abc: Done"]);
    }

    #[test]
    fn a_layer_whose_end_is_not_reported_ends_with_the_whole() {
        let mut layers = Layers::new("pull x".to_owned());
        for (layer, status) in [("a", "Pulling fs layer"), ("b", "Pulling fs layer"), ("b", "Pull complete")]
        {
            layers.convert(Some(layer.to_owned()), Some(status.to_owned()), None);
        }
        assert_eq!(texts(layers.succeeded()), ["layer a: Done", "pull x: Done"]);
    }

    #[test]
    fn layers_without_a_name_are_not_reported_one_by_one() {
        let mut layers = Layers::new("push x".to_owned());
        let mut hear = |status: &str, detail| texts(layers.convert(None, Some(status.to_owned()), detail));
        assert_eq!(hear("The push refers to x", None), ["The push refers to x"]);
        assert_eq!(hear("Preparing", None), [""; 0]);
        assert_eq!(hear("Pushing", Some(ProgressDetail::default())), [""; 0]);
        assert_eq!(hear("latest: digest: sha256:0 size: 1", None), ["latest: digest: sha256:0 size: 1"]);
    }
}
