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
        for (name, key) in [
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
        ] {
            let text = file.optional_count(key)?.and_then(|id| texts.get(id));
            tokens.insert(name, text.copied().unwrap_or_default().to_owned());
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
        let given = context! { ..given, ..Value::from(self.tokens.clone()) };
        let text = environment.render_str(&self.source, given);
        text.context("the model file's chat template cannot be filled in; leave out --chat")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(source: &str, prompt: &str) -> Result<String> {
        let tokens = [("bos_token", "<bos>".to_owned()), ("eos_token", "<eos>".to_owned())];
        ChatTemplate { source: source.to_owned(), tokens: tokens.into() }.render(prompt)
    }

    /// As the instruction-tuned Gemma models have it, with blocks on lines of their own and methods of Python.
    #[test]
    fn a_template_written_for_python_is_filled_in() {
        let source = "{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {{ raise_exception('System role not supported') }}
{%- endif -%}
{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate') }}
    {%- endif -%}
    {{ '<start_of_turn>' + message['role'] + '\\n' + message['content'].strip() + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
";
        let text = rendered(source, "  Hello {{ there }}\n").expect("a text");
        assert_eq!(
            text,
            "<bos><start_of_turn>user\nHello {{ there }}<end_of_turn>\n<start_of_turn>model\n"
        );
    }

    #[test]
    fn a_template_that_refuses_fails_or_does_not_end_is_an_error() {
        for (source, word) in [
            ("{{ raise_exception('only system messages') }}", "only system messages"),
            ("{% for message in %}", "syntax error"),
            ("{{ messages[0]['content'].frobnicate() }}", "frobnicate"),
            (
                "{% for i in range(9999) %}{% for j in range(9999) %}{{ j }}{% endfor %}{% endfor %}",
                "fuel",
            ),
        ] {
            let error = format!("{:#}", rendered(source, "x").expect_err(source));
            assert!(error.contains(word) && error.contains("--chat"), "{source}: {error}");
        }
    }
}
