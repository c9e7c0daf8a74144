//! Prints the adapter that headless work uses, or how to install one.

use std::process::ExitCode;

use wgpu_kvcache::Gpu;

fn main() -> ExitCode {
    match Gpu::headless() {
        Ok(gpu) => {
            let info = gpu.device().adapter_info();
            println!(
                "{} ({:?}, {:?}, {})",
                info.name, info.backend, info.device_type, info.driver_info
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
