//! The corpus of a fuzzer: texts that have made sense to the service.

use std::sync::{Arc, Mutex, PoisonError};

use prost_reflect::{DynamicMessage, Value};

/// A sample of texts from responses: ids, etags, page tokens, revisions.
#[derive(Clone, Debug, Default)]
pub(super) struct Corpus(Arc<Mutex<Vec<String>>>);

impl Corpus {
    const MOST: usize = 400;

    pub(super) fn any(&self, random: &mut fastrand::Rng) -> Option<String> {
        let corpus = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        random.choice(corpus.iter()).cloned()
    }

    pub(super) fn collect(&self, answer: &DynamicMessage, random: &mut fastrand::Rng) {
        for (_, value) in answer.fields() {
            self.collect_value(value, random);
        }
    }

    fn collect_value(&self, value: &Value, random: &mut fastrand::Rng) {
        match value {
            Value::String(text) if !text.is_empty() && text.len() < 200 => {
                let mut corpus = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                if corpus.len() < Self::MOST {
                    corpus.push(text.clone());
                } else {
                    corpus[random.usize(..Self::MOST)].clone_from(text);
                }
            }
            Value::Message(message) => self.collect(message, random),
            Value::List(values) => values.iter().for_each(|value| self.collect_value(value, random)),
            Value::Map(_)
            | Value::Bool(_)
            | Value::I32(_)
            | Value::I64(_)
            | Value::U32(_)
            | Value::U64(_)
            | Value::F32(_)
            | Value::F64(_)
            | Value::String(_)
            | Value::Bytes(_)
            | Value::EnumNumber(_) => {}
        }
    }
}
