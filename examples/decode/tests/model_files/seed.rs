//! Small valid model files, built from nothing.

/// A valid file, and where in it the numbers lie that count, size or point: place and bytes.
#[derive(Default)]
pub(crate) struct Seed {
    pub(crate) bytes: Vec<u8>,
    pub(crate) numbers: Vec<(usize, usize)>,
}

impl Seed {
    fn u32(&mut self, number: u32) {
        self.numbers.push((self.bytes.len(), 4));
        self.bytes.extend(number.to_le_bytes());
    }

    fn u64(&mut self, number: usize) {
        self.numbers.push((self.bytes.len(), 8));
        self.bytes.extend((number as u64).to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.u64(text.len());
        self.bytes.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, value: &Value<'_>) {
        self.text(key);
        match *value {
            Value::Count(number) => {
                self.u32(4);
                self.u32(number);
            }
            Value::Wide(number) => {
                self.u32(10);
                self.u64(number);
            }
            Value::Number(number) => {
                self.u32(6);
                self.u32(number.to_bits());
            }
            Value::Flag(flag) => {
                self.u32(7);
                self.bytes.push(u8::from(flag));
            }
            Value::Text(text) => {
                self.u32(8);
                self.text(text);
            }
            Value::Texts(texts) => {
                self.list(8, texts.len());
                texts.iter().for_each(|text| self.text(text));
            }
            Value::Integers(integers) => {
                self.list(5, integers.len());
                integers.iter().for_each(|&integer| self.u32(integer));
            }
            Value::Numbers(numbers) => {
                self.list(6, numbers.len());
                numbers.iter().for_each(|number| self.u32(number.to_bits()));
            }
            Value::Bytes(bytes) => {
                self.list(0, bytes.len());
                self.bytes.extend(bytes);
            }
        }
    }

    fn list(&mut self, kind: u32, length: usize) {
        self.u32(9);
        self.u32(kind);
        self.u64(length);
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(32), 0);
    }
}

/// What lies under a key.
enum Value<'a> {
    Count(u32),
    Wide(usize),
    Number(f32),
    Flag(bool),
    Text(&'a str),
    Texts(&'a [&'a str]),
    Integers(&'a [u32]),
    Numbers(&'a [f32]),
    Bytes(&'a [u8]),
}

/// How numbers are stored: GGUF's number for it, numbers a block, bytes a block.
type Format = (u32, usize, usize);
const F32: Format = (0, 1, 4);
const F16: Format = (1, 1, 2);
const Q4_0: Format = (2, 32, 18);
const Q4_1: Format = (3, 32, 20);
const Q5_0: Format = (6, 32, 22);
const Q8_0: Format = (8, 32, 34);
const Q4_K: Format = (12, 256, 144);
const Q6_K: Format = (14, 256, 210);
const BF16: Format = (30, 1, 2);

/// What a tiny model is of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Llama,
    Gemma,
}

/// A model of one or more layers, of two heads that share their K and V.
struct Tiny {
    kind: Kind,
    layers: u32,
    width: usize,
    /// Formats that the matrices take in turn.
    formats: &'static [Format],
    /// With a head of its own, divisors of the rotary frequencies, and keys that may be left out.
    has_all: bool,
}

const TOKENS: [&str; 8] = ["<|endoftext|>", "a", "b", "c", "ab", "bc", "Ġ", "Ġa"];
const KINDS: [u32; 8] = [3, 1, 1, 1, 1, 1, 1, 1];
const SPM_TOKENS: [&str; 8] = ["<bos>", "a", "b", "c", "ab", "<0x20>", "\u{2581}", "\u{2581}a"];
const SPM_KINDS: [u32; 8] = [3, 1, 1, 1, 1, 6, 1, 1];
const SPM_SCORES: [f32; 8] = [0.0, -3.0, -4.0, -5.0, -1.0, 0.0, -6.0, -2.0];
const MERGES: [&str; 3] = ["a b", "b c", "Ġ a"];

impl Tiny {
    fn tensors(&self) -> Vec<(String, Vec<usize>, Format)> {
        let Self { width, .. } = *self;
        let mut formats = self.formats.iter().copied().cycle();
        let mut matrix = |name: String, inputs: usize, outputs: usize| {
            (name, vec![inputs, outputs], formats.next().expect("a cycle does not end"))
        };
        let vector = |name: String, length: usize| (name, vec![length], F32);
        let mut tensors = vec![
            matrix("token_embd.weight".to_owned(), width, TOKENS.len()),
            vector("output_norm.weight".to_owned(), width),
        ];
        if self.has_all {
            tensors.push(matrix("output.weight".to_owned(), width, TOKENS.len()));
            tensors.push(vector("rope_freqs.weight".to_owned(), width / 4));
        }
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            tensors.push(vector(name("attn_norm"), width));
            tensors.push(vector(name("ffn_norm"), width));
            if self.kind == Kind::Gemma {
                tensors.push(vector(name("attn_q_norm"), width / 2));
                tensors.push(vector(name("attn_k_norm"), width / 2));
                tensors.push(vector(name("post_attention_norm"), width));
                tensors.push(vector(name("post_ffw_norm"), width));
            }
            for (part, outputs) in [
                ("attn_q", width),
                ("attn_k", width / 2),
                ("attn_v", width / 2),
                ("attn_output", width),
                ("ffn_gate", width),
                ("ffn_up", width),
                ("ffn_down", width),
            ] {
                tensors.push(matrix(name(part), width, outputs));
            }
        }
        tensors
    }

    fn keys<'a>(&self) -> Vec<(&'static str, Value<'a>)> {
        match self.kind {
            Kind::Llama => self.llama_keys(),
            Kind::Gemma => self.gemma_keys(),
        }
    }

    fn gemma_keys<'a>(&self) -> Vec<(&'static str, Value<'a>)> {
        let width = u32::try_from(self.width).expect("tiny");
        vec![
            ("general.architecture", Value::Text("gemma3")),
            ("gemma3.block_count", Value::Count(self.layers)),
            ("gemma3.context_length", Value::Count(64)),
            ("gemma3.embedding_length", Value::Count(width)),
            ("gemma3.feed_forward_length", Value::Count(width)),
            ("gemma3.attention.head_count", Value::Count(2)),
            ("gemma3.attention.head_count_kv", Value::Count(1)),
            ("gemma3.attention.key_length", Value::Count(width / 2)),
            ("gemma3.attention.sliding_window", Value::Count(4)),
            ("gemma3.attention.sliding_window_pattern", Value::Count(2)),
            ("gemma3.attention.layer_norm_rms_epsilon", Value::Number(1e-6)),
            ("gemma3.rope.freq_base", Value::Number(1e6)),
            ("gemma3.rope.freq_base_swa", Value::Number(1e4)),
            ("tokenizer.ggml.model", Value::Text("llama")),
            ("tokenizer.ggml.tokens", Value::Texts(&SPM_TOKENS)),
            ("tokenizer.ggml.token_type", Value::Integers(&SPM_KINDS)),
            ("tokenizer.ggml.scores", Value::Numbers(&SPM_SCORES)),
            ("tokenizer.ggml.add_space_prefix", Value::Flag(false)),
            ("tokenizer.ggml.add_bos_token", Value::Flag(true)),
            ("tokenizer.ggml.bos_token_id", Value::Count(0)),
            ("tokenizer.ggml.unknown_token_id", Value::Count(1)),
            ("tokenizer.chat_template", Value::Text("{{ bos_token }}{{ messages[0].content }}")),
        ]
    }

    fn llama_keys<'a>(&self) -> Vec<(&'static str, Value<'a>)> {
        let width = u32::try_from(self.width).expect("tiny");
        let mut keys = vec![
            ("general.architecture", Value::Text("llama")),
            ("llama.block_count", Value::Count(self.layers)),
            ("llama.context_length", Value::Count(64)),
            ("llama.embedding_length", Value::Count(width)),
            ("llama.feed_forward_length", Value::Count(width)),
            ("llama.attention.head_count", Value::Count(2)),
            ("llama.attention.head_count_kv", Value::Count(1)),
            ("llama.attention.layer_norm_rms_epsilon", Value::Number(1e-5)),
            ("tokenizer.ggml.model", Value::Text("gpt2")),
            ("tokenizer.ggml.pre", Value::Text("smollm")),
            ("tokenizer.ggml.tokens", Value::Texts(&TOKENS)),
            ("tokenizer.ggml.token_type", Value::Integers(&KINDS)),
            ("tokenizer.ggml.merges", Value::Texts(&MERGES)),
        ];
        if self.has_all {
            keys.extend([
                ("general.alignment", Value::Count(32)),
                ("general.noise", Value::Bytes(&[7; 40])),
                ("llama.rope.scaling.type", Value::Text("none")),
                ("llama.rope.freq_base", Value::Number(10_000.0)),
                ("llama.rope.dimension_count", Value::Count(width / 2)),
                ("llama.attention.key_length", Value::Wide(self.width / 2)),
                ("llama.attention.value_length", Value::Wide(self.width / 2)),
                ("tokenizer.ggml.add_bos_token", Value::Flag(true)),
                ("tokenizer.ggml.bos_token_id", Value::Count(0)),
                ("tokenizer.ggml.eos_token_id", Value::Count(0)),
            ]);
        }
        keys
    }

    fn seed(&self) -> Seed {
        self.seed_of(&self.keys())
    }

    fn seed_of(&self, keys: &[(&str, Value<'_>)]) -> Seed {
        let tensors = self.tensors();
        let mut seed = Seed::default();
        seed.bytes.extend(b"GGUF");
        seed.u32(3);
        seed.u64(tensors.len());
        seed.u64(keys.len());
        for (key, value) in keys {
            seed.key(key, value);
        }
        let mut offset = 0;
        let mut sizes = Vec::new();
        for (name, shape, (kind, numbers, bytes)) in &tensors {
            seed.text(name);
            seed.u32(u32::try_from(shape.len()).expect("one or two"));
            shape.iter().for_each(|&extent| seed.u64(extent));
            seed.u32(*kind);
            seed.u64(offset);
            let size = shape.iter().product::<usize>() / numbers * bytes;
            offset += size.next_multiple_of(32);
            sizes.push(size);
        }
        for size in sizes {
            seed.pad();
            seed.bytes.extend((0_u8..=250).cycle().take(size));
        }
        seed
    }
}

pub(crate) fn seeds() -> Vec<Seed> {
    let (llama, gemma) = (Kind::Llama, Kind::Gemma);
    let tiny = [
        Tiny { kind: llama, layers: 1, width: 8, formats: &[F32], has_all: false },
        Tiny { kind: llama, layers: 2, width: 8, formats: &[F16, BF16], has_all: true },
        Tiny {
            kind: llama,
            layers: 1,
            width: 32,
            formats: &[Q8_0, Q4_0, Q4_1, Q5_0],
            has_all: true,
        },
        Tiny { kind: llama, layers: 1, width: 256, formats: &[Q4_K, Q6_K], has_all: false },
        Tiny { kind: gemma, layers: 2, width: 8, formats: &[F32], has_all: false },
    ];
    tiny.iter().map(Tiny::seed).collect()
}

/// Tokens of one letter, 1 to 600 times: each is merged from any shorter one and the rest.
pub(crate) fn endless_merges() -> Seed {
    let tiny = Tiny { kind: Kind::Gemma, layers: 1, width: 8, formats: &[F32], has_all: false };
    let texts: Vec<String> = (1..=600).map(|length| "a".repeat(length)).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let kinds = vec![1; texts.len()];
    let scores = vec![0.0; texts.len()];
    let mut keys = tiny.keys();
    for (key, value) in &mut keys {
        match *key {
            "tokenizer.ggml.tokens" => *value = Value::Texts(&texts),
            "tokenizer.ggml.token_type" => *value = Value::Integers(&kinds),
            "tokenizer.ggml.scores" => *value = Value::Numbers(&scores),
            _ => {}
        }
    }
    tiny.seed_of(&keys)
}
