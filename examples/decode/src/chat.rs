//! A prompt as a message of a chat, written as the model was trained to read it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::gguf::GgufFile;

/// The steps that a template may take: far more than one message needs. A file's template could loop without an end.
const FUEL: u64 = 1_000_000;

/// The template of a chat that a model file holds.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    /// In the language of Jinja.
    source: String,
    /// The texts of the tokens that begin and end a text; empty if the file names none.
    tokens: BTreeMap<&'static str, String>,
}

impl ChatTemplate {
    /// Reads the template.
    ///
    /// # Errors
    ///
    /// If the file has none: its model was not trained to chat.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let source = file.optional_text("tokenizer.chat_template").context(
            "the model file has no chat template (tokenizer.chat_template), so its model was not trained to chat; leave out --chat, or choose another model",
        )?;
        let texts = file.texts("tokenizer.ggml.tokens")?;
        let mut tokens = BTreeMap::new();
        for name in ["bos", "eos"] {
            let id = file.optional_count(&format!("tokenizer.ggml.{name}_token_id"))?;
            let text = id.and_then(|id| texts.get(id)).copied().unwrap_or_default();
            tokens.insert(if name == "bos" { "bos_token" } else { "eos_token" }, text.to_owned());
        }
        Ok(Self { source: source.to_owned(), tokens })
    }

    /// The text that asks the model to answer `prompt`, the first message of a user.
    ///
    /// # Errors
    ///
    /// If the template is not well-formed, or refuses the message.
    pub fn render(&self, prompt: &str) -> Result<String> {
        // What templates of models are written for: transformers and Jinja of Python.
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let message = context! { role => "user", content => prompt };
        let given = context! { messages => vec![message], add_generation_prompt => true };
        let tokens = self.tokens.iter().map(|(name, text)| (*name, Value::from(text.as_str())));
        let given = context! { ..given, ..tokens.collect::<Value>() };
        let text = environment.render_str(&self.source, given);
        text.context("the model file's chat template cannot be filled in; leave out --chat")
    }
}
