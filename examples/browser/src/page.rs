//! What `../page.js` calls. All calls of one [`Decoder`] come one after the other: a call that is awaited ends before the
//! next one begins.

use std::sync::Arc;

use anyhow::{Error, Result, anyhow};
use engine::GgufFile;
use js_sys::{Function, Uint8Array};
use serde_json::json;
use wasm_bindgen::prelude::*;
use wgpu_kvcache::{Format, Formats, Gpu, HeadlessOptions};

use crate::session::{Session, Settings};
use crate::source::Source;

/// Panics are written to the console.
#[wasm_bindgen(start)]
fn start() {
    console_error_panic_hook::set_once();
}

/// The browser's GPU.
#[wasm_bindgen]
#[derive(Debug)]
pub struct Device {
    gpu: Gpu,
}

#[wasm_bindgen]
impl Device {
    /// Opens the GPU. `on_lost(reason)` is called if it goes away, and `on_error(text)` if it reports an error that no
    /// call returns.
    ///
    /// # Errors
    ///
    /// If there is no adapter or no device.
    pub async fn open(on_lost: Function, on_error: Function) -> Result<Self, JsError> {
        let gpu = Gpu::headless_async(&HeadlessOptions::default()).await?;
        let lost = Caller(on_lost);
        gpu.device().set_device_lost_callback(move |_, message| lost.call(&message));
        let error = Caller(on_error);
        gpu.device().on_uncaptured_error(Arc::new(move |it| error.call(&it.to_string())));
        Ok(Self { gpu })
    }

    /// The adapter and the limits of the device that bound a model and its cache, as JSON.
    pub fn adapter(&self) -> String {
        let info = self.gpu.device().adapter_info();
        let limits = self.gpu.device().limits();
        let driver = [info.driver, info.driver_info].join(" ");
        json!({
            "name": info.name,
            "driver": driver.trim(),
            "limits": {
                "buffer": limits.max_buffer_size,
                "storage binding": limits.max_storage_buffer_binding_size,
                "storage buffers a stage": limits.max_storage_buffers_per_shader_stage,
                "texture side": limits.max_texture_dimension_2d,
                "invocations a workgroup": limits.max_compute_invocations_per_workgroup,
            },
        })
        .to_string()
    }

    /// Loads a model file onto the GPU. `format` is that of K and V in the cache, `max_tokens` the longest sequence.
    /// `progress(done, total)` receives bytes; if it throws, loading ends.
    ///
    /// # Errors
    ///
    /// If the file is not a supported model, or the device is too small for it.
    pub async fn load(
        &self,
        name: String,
        bytes: Uint8Array,
        format: String,
        max_tokens: usize,
        progress: Function,
    ) -> Result<Decoder, JsError> {
        let load = async {
            let format: Format = format.parse()?;
            let settings = Settings { formats: Formats::from(format), max_tokens };
            let mut file = GgufFile::read(&name, Source::new(bytes))?;
            let total = file.tensor_bytes();
            let mut report = |done: u64| report(&progress, number(done), number(total));
            Session::load(&self.gpu, &mut file, settings, &mut report).await
        };
        Ok(Decoder { session: load.await.map_err(explain)? })
    }

    /// Gives the GPU back, as if it were lost.
    pub fn close(&self) {
        self.gpu.device().destroy();
    }
}

/// A model on a device, and the sequences that it decodes.
#[wasm_bindgen]
#[expect(missing_debug_implementations, reason = "it is not for printing")]
pub struct Decoder {
    session: Session,
}

#[wasm_bindgen]
impl Decoder {
    /// Compiles all pipelines. `progress(done, total)` receives stages of that; if it throws, compiling ends.
    ///
    /// # Errors
    ///
    /// If one does not compile.
    pub async fn compile(&mut self, progress: Function) -> Result<(), JsError> {
        let mut report = |done: usize, total: usize| report(&progress, done.into(), total.into());
        self.session.compile(&mut report).await.map_err(explain)
    }

    /// See [`Session::can_chat`].
    #[wasm_bindgen(js_name = canChat)]
    pub fn can_chat(&self) -> bool {
        self.session.can_chat()
    }

    /// See [`Session::add`].
    ///
    /// # Errors
    ///
    /// As there; so every call here.
    pub fn add(&mut self, prompt: &str, is_chat: bool, wanted: usize) -> Result<usize, JsError> {
        self.session.add(prompt, is_chat, wanted).map_err(explain)
    }

    /// See [`Session::stop`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn stop(&mut self, number: usize) -> Result<(), JsError> {
        self.session.stop(number).map_err(explain)
    }

    /// See [`Session::resume`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn resume(&mut self, number: usize, wanted: usize) -> Result<(), JsError> {
        self.session.resume(number, wanted).map_err(explain)
    }

    /// See [`Session::remove`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn remove(&mut self, number: usize) -> Result<(), JsError> {
        self.session.remove(number).map_err(explain)
    }

    /// See [`Session::fork`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn fork(
        &mut self,
        number: usize,
        ways: usize,
        wanted: usize,
    ) -> Result<Vec<usize>, JsError> {
        self.session.fork(number, ways, wanted).await.map_err(explain)
    }

    /// See [`Session::step`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn step(&mut self) -> Result<usize, JsError> {
        self.session.step().await.map_err(explain)
    }

    /// See [`Session::save`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn save(&mut self, number: usize) -> Result<Vec<u8>, JsError> {
        self.session.save(number).await.map_err(explain)
    }

    /// See [`Session::restore`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<usize, JsError> {
        self.session.restore(bytes).map_err(explain)
    }

    /// See [`Session::state`]; as JSON.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn state(&self) -> Result<String, JsError> {
        let state = self.session.state().map_err(explain)?;
        Ok(serde_json::to_string(&state)?)
    }
}

/// A function of the page that wgpu calls back. A browser's program has one thread.
struct Caller(Function);

impl Caller {
    fn call(&self, text: &str) {
        // A page that cannot show the text has nobody to tell.
        let _ = self.0.call1(&JsValue::NULL, &JsValue::from_str(text));
    }
}

/// Calls a function of the page that shows progress. What it throws ends the work.
fn report(progress: &Function, done: JsValue, total: JsValue) -> Result<()> {
    progress.call2(&JsValue::NULL, &done, &total).map_err(|_| anyhow!("cancelled"))?;
    Ok(())
}

/// An error with its causes.
fn explain(error: Error) -> JsError {
    JsError::new(&format!("{error:#}"))
}

/// A count of bytes as the page takes it.
#[expect(clippy::cast_precision_loss, reason = "counts of bytes below 2^53")]
fn number(bytes: u64) -> JsValue {
    JsValue::from_f64(bytes as f64)
}
