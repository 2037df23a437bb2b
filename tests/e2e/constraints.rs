//! The annotations of the protocol: every field has its behaviour, and no constraint refuses what the service
//! accepts.

use std::{fs, path::Path};

use anyhow::Context as _;
use prost_protovalidate::{Error, Validator};
use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, MessageDescriptor};

/// The constraints of all messages, as a client checks them before a call.
pub(crate) struct Constraints {
    pool: DescriptorPool,
    validator: Validator,
}

impl Constraints {
    /// Compiles the `.proto` files with their options.
    pub(crate) fn load() -> anyhow::Result<Self> {
        const MODULES: [&str; 3] = ["api", "dispatch", "vendor"];
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto");
        let mut compiler = protox::Compiler::new(MODULES.map(|module| root.join(module)))?;
        compiler.include_imports(true);
        for package in ["api/trailer/images/v1", "dispatch/trailer/dispatch/v1"] {
            for file in fs::read_dir(root.join(package))? {
                compiler.open_file(file?.path())?;
            }
        }
        Ok(Self { pool: compiler.descriptor_pool(), validator: Validator::new() })
    }

    /// Returns the violations of an encoded message, which must be one of that name.
    pub(crate) fn violations(&self, name: &str, bytes: &[u8]) -> anyhow::Result<Option<String>> {
        let message = self.pool.get_message_by_name(name).with_context(|| format!("{name} is no message"))?;
        match self.validator.validate(&DynamicMessage::decode(message, bytes)?) {
            Ok(()) => Ok(None),
            Err(Error::Validation(violations)) => Ok(Some(violations.to_string())),
            Err(error) => Err(anyhow::anyhow!("{name}: {error}")),
        }
    }

    /// Returns the messages of our own packages.
    fn messages(&self) -> impl Iterator<Item = MessageDescriptor> {
        self.pool.all_messages().filter(|message| message.package_name().starts_with("trailer."))
    }
}

#[test]
fn every_field_says_how_it_behaves() -> anyhow::Result<()> {
    let constraints = Constraints::load()?;
    let behaviour = constraints
        .pool
        .get_extension_by_name("google.api.field_behavior")
        .context("the extension of the vendored file")?;
    let has_none = |field: &FieldDescriptor| !field.options().has_extension(&behaviour);
    let without: Vec<String> = constraints
        .messages()
        .filter(|message| !message.is_map_entry())
        .flat_map(|message| message.fields().filter(has_none).collect::<Vec<_>>())
        .map(|field| field.full_name().to_owned())
        .collect();
    assert_eq!(without, [""; 0]);
    Ok(())
}

#[test]
fn every_constraint_can_be_checked() -> anyhow::Result<()> {
    let constraints = Constraints::load()?;
    let mut required = 0;
    for message in constraints.messages() {
        // Nothing is set, so whatever is required is missing.
        required += usize::from(constraints.violations(message.full_name(), &[])?.is_some());
    }
    assert!(required > 20, "{required} messages have what is required");
    Ok(())
}
