//! The sequences of a page.
//!
//! Nothing here runs by itself: the page calls [`Session::step`] again and again, and everything else between two
//! steps.

use anyhow::{Context, Result, bail, ensure};
use engine::{
    Batch, ChatTemplate, Config, Engine, GgufFile, Model, Options, Piece, Tokenizer, finished,
};
use wgpu_kvcache::{Formats, Gpu, Layout, SequenceCache, SequenceId};

use crate::saved::Text;
use crate::state::{Sequence, State, Status};

/// The most sequences that are decoded at a time. Others wait.
const MAX_BATCH: usize = 8;

/// The choices of a session.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How the cache stores K and V.
    pub formats: Formats,
    /// The most tokens of a sequence, if the model's context allows it.
    pub max_tokens: usize,
}

/// A model, a cache of sequences, and the sequences.
#[expect(missing_debug_implementations, reason = "it is not for printing")]
pub struct Session {
    engine: Engine,
    cache: SequenceCache,
    tokenizer: Tokenizer,
    /// If the model was trained to chat.
    chat: Option<ChatTemplate>,
    max_tokens: usize,
    batch: Batch,
    sequences: Vec<Member>,
    /// How many were ever added.
    added: usize,
}

/// A sequence of the cache.
struct Member {
    number: usize,
    parent: Option<usize>,
    id: SequenceId,
    status: Status,
    /// Its last chosen id comes into the cache with the next step.
    text: Text,
    /// How many chosen ids there will be.
    wanted: usize,
}

impl Member {
    /// The ids that are not in the cache.
    fn rest(&self, cache: &SequenceCache) -> Result<Vec<u32>> {
        let held = cache.len(self.id)?;
        Ok(self.text.all_ids().skip(held).collect())
    }

    /// Whether it is in the batch.
    fn goes_on(&self) -> bool {
        matches!(self.status, Status::Prefills | Status::Decodes)
    }
}

impl Session {
    /// Reads a model and prepares to decode with it. `progress` receives the bytes that are loaded, of
    /// [`GgufFile::tensor_bytes`]; its error ends the load.
    ///
    /// # Errors
    ///
    /// If the model is not supported, or the device too small for it.
    pub async fn load(
        gpu: &Gpu,
        file: &mut GgufFile,
        settings: Settings,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let config = Config::from_gguf(file)?;
        let chat = ChatTemplate::from_gguf(file).ok();
        let tokenizer = Tokenizer::from_gguf(file)?;
        let model = Model::load(gpu, file, progress).await?;
        let max_tokens = settings.max_tokens.min(config.context);
        let options = Options { formats: settings.formats, max_tokens, max_batch: MAX_BATCH };
        let engine = Engine::new(gpu, &model, options)?;
        let options = engine.cache_options().with_max_cache_len(max_tokens);
        let cache = SequenceCache::with_options(gpu, &engine.layer_shapes(), options)?;
        let (batch, sequences) = (Batch::default(), Vec::new());
        Ok(Self { engine, cache, tokenizer, chat, max_tokens, batch, sequences, added: 0 })
    }

    /// Compiles all pipelines, so that the first prompt does not wait for them. `progress` receives the stages that are
    /// done, and all; its error ends the work.
    ///
    /// # Errors
    ///
    /// If one does not compile.
    pub async fn compile(
        &mut self,
        progress: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<()> {
        self.engine.warm_up(Layout::RaggedPaged, progress).await
    }

    /// Whether the model was trained to chat.
    pub fn can_chat(&self) -> bool {
        self.chat.is_some()
    }

    /// Adds a sequence that goes on from a prompt for at most `wanted` tokens, and returns its number. As a chat's
    /// message, the model answers it; otherwise it continues the text.
    ///
    /// # Errors
    ///
    /// If the prompt has no token, or too many.
    pub fn add(&mut self, prompt: &str, is_chat: bool, wanted: usize) -> Result<usize> {
        ensure!(!prompt.trim().is_empty(), "Type a prompt first.");
        let prompt_ids = match &self.chat {
            Some(chat) if is_chat => self.tokenizer.encode(&chat.render(prompt)?)?,
            None if is_chat => bail!("This model was not trained to chat."),
            _ => self.tokenizer.encode(prompt)?,
        };
        let (count, most) = (prompt_ids.len(), self.max_tokens);
        ensure!(
            count < most,
            "The prompt has {count} tokens, and a sequence has room for {most}; shorten it."
        );
        let id = self.cache.add()?;
        let text = Text { prompt: prompt.to_owned(), prompt_ids, ids: Vec::new(), is_chat };
        Ok(self.push(None, id, Status::Waits, text, wanted))
    }

    /// Stops a sequence. It stays in the cache.
    ///
    /// # Errors
    ///
    /// If there is no such sequence; so every call here.
    pub fn stop(&mut self, number: usize) -> Result<()> {
        let member = self.member(number)?;
        if member.goes_on() || member.status == Status::Waits {
            member.status = Status::Stopped;
            self.batch.leave(number);
        }
        Ok(())
    }

    /// Lets a sequence go on for at most `wanted` more tokens.
    ///
    /// # Errors
    ///
    /// See [`Self::stop`].
    pub fn resume(&mut self, number: usize, wanted: usize) -> Result<()> {
        let most = self.max_tokens;
        let member = self.member(number)?;
        ensure!(
            member.text.len() < most,
            "The sequence has {most} tokens, as many as the cache allows."
        );
        member.wanted = member.text.ids.len() + wanted;
        if !member.goes_on() {
            member.status = Status::Waits;
        }
        Ok(())
    }

    /// Removes a sequence. Pages that no other one refers to are free again.
    ///
    /// # Errors
    ///
    /// See [`Self::stop`].
    pub fn remove(&mut self, number: usize) -> Result<()> {
        let id = self.member(number)?.id;
        self.batch.leave(number);
        self.cache.remove(id)?;
        self.sequences.retain(|member| member.number != number);
        Ok(())
    }

    /// Lets a sequence go on in several ways: it with the best next token, and forks of it with the next best ones, for
    /// at most `wanted` more tokens each. The forks share its pages, and each gets a copy of the last one when it
    /// first writes into it. Returns the numbers of the forks.
    ///
    /// # Errors
    ///
    /// If the sequence has no token yet, or as many as the cache allows.
    pub async fn fork(&mut self, number: usize, ways: usize, wanted: usize) -> Result<Vec<usize>> {
        let most = self.max_tokens;
        let Member { id, ref text, status, .. } = *self.member(number)?;
        let tokens: Vec<u32> = text.all_ids().collect();
        ensure!(
            !matches!(status, Status::Waits | Status::Prefills),
            "The prompt is not in the cache yet. Fork the sequence once it has a token of its own."
        );
        ensure!(
            tokens.len() + 1 < most,
            "The sequence has {} tokens, and {most} are as many as the cache allows.",
            tokens.len()
        );
        if self.cache.len(id)? == tokens.len() {
            // The last token runs again, for the logits after it.
            self.cache.drop_latest(id, 1)?;
        }
        let rest = &tokens[self.cache.len(id)?..];
        let piece = Piece { id, tokens: rest, is_last: true };
        let logits = self.engine.logits_of_sequences(&mut self.cache, &[piece]).await?;
        let mut best = best(&logits, ways, self.end(number)?).into_iter();
        // The first of the wanted tokens is chosen here.
        let (more, status) =
            if wanted > 1 { (wanted - 1, Status::Waits) } else { (0, Status::Stopped) };

        self.batch.leave(number);
        let mut forks = Vec::new();
        let first = best.next().context("the model chose no token")?;
        for token in best {
            let fork = self.cache.fork(id, tokens.len())?;
            let mut text = self.member(number)?.text.clone();
            text.ids.push(token);
            let wanted = text.ids.len() + more;
            forks.push(self.push(Some(number), fork, status, text, wanted));
        }
        let member = self.member(number)?;
        member.text.ids.push(first);
        (member.wanted, member.status) = (member.text.ids.len() + more, status);
        Ok(forks)
    }

    /// Runs one step of all sequences that go on, and returns how many tokens it chose. Does nothing if there are none.
    ///
    /// # Errors
    ///
    /// If the step fails. The cache is then of no more use.
    pub async fn step(&mut self) -> Result<usize> {
        self.join()?;
        if self.batch.is_empty() {
            return Ok(0);
        }
        let step = self.batch.step(&mut self.engine, &mut self.cache, None).await?;
        let count = step.chosen.len();
        if count == 0 {
            // Pieces of prompts alone: the browser draws before the next ones.
            finished(self.engine.gpu()).await?;
        }
        for (number, token) in step.chosen {
            let end = self.end(number)?;
            let most = self.max_tokens;
            let member = self.member(number)?;
            member.status = Status::Decodes;
            if end == Some(token) {
                member.status = Status::Ended;
            } else {
                member.text.ids.push(token);
                if member.text.len() >= most {
                    member.status = Status::Full;
                } else if member.text.ids.len() >= member.wanted {
                    member.status = Status::Stopped;
                }
            }
            if !member.goes_on() {
                self.batch.leave(number);
            }
        }
        Ok(count)
    }

    /// A sequence as a file: its tokens in the cache, and its text.
    ///
    /// # Errors
    ///
    /// If it has no token in the cache, or the device is lost.
    pub async fn save(&mut self, number: usize) -> Result<Vec<u8>> {
        let Member { id, ref text, .. } = *self.member(number)?;
        let text = text.clone();
        ensure!(self.cache.len(id)? > 0, "The sequence has no token in the cache yet.");
        text.add_to(&self.cache.save_async(id).await?)
    }

    /// Adds a saved sequence, and returns its number. It is stopped.
    ///
    /// # Errors
    ///
    /// If the file is not one that [`Self::save`] made, for this model and these formats.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<usize> {
        let text = Text::of(bytes)?;
        let vocabulary = self.engine.config().vocabulary;
        let count = text.len();
        ensure!(
            count <= self.max_tokens && text.all_ids().all(|id| (id as usize) < vocabulary),
            "The file is of another model, or of a longer sequence than the cache allows."
        );
        let gpu = self.engine.gpu().clone();
        let id = gpu.submit_pass("restore", |pass| self.cache.restore(pass, bytes))?;
        if !(1..=count).contains(&self.cache.len(id)?) {
            self.cache.remove(id)?;
            bail!("The file's text does not belong to its tokens.");
        }
        let wanted = text.ids.len();
        Ok(self.push(None, id, Status::Stopped, text, wanted))
    }

    /// What the page shows.
    ///
    /// # Errors
    ///
    /// If recorded work was lost.
    pub fn state(&self) -> Result<State> {
        let sequences = self.sequences.iter().map(|member| {
            let text = self.tokenizer.decode(&member.text.ids)?;
            Ok(Sequence {
                number: member.number,
                parent: member.parent,
                status: member.status,
                prompt: member.text.prompt.clone(),
                // A character that spans tokens is held back until its last byte.
                text: text.trim_end_matches('\u{fffd}').to_owned(),
                prompt_ids: member.text.prompt_ids.clone(),
                ids: member.text.ids.clone(),
                length: self.cache.len(member.id)?,
                pages: self.cache.pages(member.id, 0)?.to_vec(),
            })
        });
        let stats = self.cache.stats();
        let pages = stats.pages_used + stats.pages_free;
        Ok(State {
            sequences: sequences.collect::<Result<_>>()?,
            is_busy: self.sequences.iter().any(|it| it.goes_on() || it.status == Status::Waits),
            max_tokens: self.max_tokens,
            layers: self.cache.num_layers(),
            page_tokens: self.cache.page_tokens(),
            page_bytes: stats.bytes_allocated.checked_div(pages).unwrap_or(0),
            pages_used: stats.pages_used,
            pages_shared: stats.pages_shared,
            pages_free: stats.pages_free,
            bytes_allocated: stats.bytes_allocated,
        })
    }

    /// Lets sequences that wait join the batch while there is room.
    fn join(&mut self) -> Result<()> {
        for member in &mut self.sequences {
            if member.status == Status::Waits && self.batch.len() < self.engine.max_batch() {
                let mut rest = member.rest(&self.cache)?;
                if rest.is_empty() {
                    // The last token runs again, so that one is chosen after it.
                    self.cache.drop_latest(member.id, 1)?;
                    rest = member.rest(&self.cache)?;
                }
                self.batch.join(member.number, member.id, rest)?;
                member.status =
                    if member.text.ids.is_empty() { Status::Prefills } else { Status::Decodes };
            }
        }
        Ok(())
    }

    /// Adds a sequence under a number of its own.
    fn push(
        &mut self,
        parent: Option<usize>,
        id: SequenceId,
        status: Status,
        text: Text,
        wanted: usize,
    ) -> usize {
        self.added += 1;
        self.sequences.push(Member { number: self.added, parent, id, status, text, wanted });
        self.added
    }

    fn member(&mut self, number: usize) -> Result<&mut Member> {
        let found = self.sequences.iter_mut().find(|member| member.number == number);
        found.with_context(|| format!("There is no sequence {number}."))
    }

    /// The token that ends a sequence.
    fn end(&mut self, number: usize) -> Result<Option<u32>> {
        let is_chat = self.member(number)?.text.is_chat;
        Ok(self.tokenizer.end_of_turn.filter(|_| is_chat).or(self.tokenizer.end))
    }
}

/// The tokens with the highest logits, other than `banned`, the best first.
fn best(logits: &[f32], count: usize, banned: Option<u32>) -> Vec<u32> {
    let mut tokens: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    tokens.retain(|&(token, _)| Some(token) != banned);
    tokens.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    tokens.into_iter().take(count).map(|(token, _)| token).collect()
}
