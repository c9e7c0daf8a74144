//! The conformance tests of `wgpu-kvcache`, built for a browser: see `tests/browser.sh`.
