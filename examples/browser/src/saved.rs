//! A saved sequence with the text that it is of: the cache's file, with more texts in its metadata.

use std::collections::HashMap;

use anyhow::{Context, Result};
use safetensors::SafeTensors;

/// The keys of the metadata.
const PROMPT: &str = "prompt";
const PROMPT_IDS: &str = "prompt_ids";
const IDS: &str = "ids";
const IS_CHAT: &str = "is_chat";

/// The text of a sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Text {
    pub(crate) prompt: String,
    pub(crate) prompt_ids: Vec<u32>,
    /// Chosen ids.
    pub(crate) ids: Vec<u32>,
    /// Whether the chosen ids are a chat's answer, which ends with a token of its own.
    pub(crate) is_chat: bool,
}

impl Text {
    /// The ids of the prompt, and those that were chosen.
    pub(crate) fn all_ids(&self) -> impl Iterator<Item = u32> {
        self.prompt_ids.iter().chain(&self.ids).copied()
    }

    /// How many ids these are.
    pub(crate) fn len(&self) -> usize {
        self.prompt_ids.len() + self.ids.len()
    }

    /// The file of the cache with this text in its metadata.
    pub(crate) fn add_to(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let mut about = header.metadata().clone().unwrap_or_default();
        about.insert(PROMPT.to_owned(), self.prompt.clone());
        about.insert(PROMPT_IDS.to_owned(), serde_json::to_string(&self.prompt_ids)?);
        about.insert(IDS.to_owned(), serde_json::to_string(&self.ids)?);
        about.insert(IS_CHAT.to_owned(), self.is_chat.to_string());
        let file = SafeTensors::deserialize(bytes)?;
        Ok(safetensors::serialize(file.tensors(), Some(about))?)
    }

    /// The text of a file.
    pub(crate) fn of(bytes: &[u8]) -> Result<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes)
            .context("this is not a file that the page has saved, or not all of it")?;
        let none = HashMap::new();
        let about = header.metadata().as_ref().unwrap_or(&none);
        let say =
            |key: &str| about.get(key).context("this file holds no text: the page did not save it");
        Ok(Self {
            prompt: say(PROMPT)?.clone(),
            prompt_ids: serde_json::from_str(say(PROMPT_IDS)?)?,
            ids: serde_json::from_str(say(IDS)?)?,
            is_chat: say(IS_CHAT)?.parse()?,
        })
    }
}
