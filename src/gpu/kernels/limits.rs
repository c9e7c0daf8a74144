//! The limits that the kernels need.

use super::WORKGROUP;
use crate::error::{Error, Result};
use crate::gpu::arena::{CHUNK_BYTES, PARAMS_BYTES};

/// Bytes of workgroup memory in the kernel that uses most, of those that every device must run.
pub(super) const WORKGROUP_BYTES: u32 = 8 << 10;

/// Bytes of workgroup memory of attention in tiles, which is left out where a device has less.
pub(super) const TILES_BYTES: u32 = 16 << 10;

/// Refuses a device with a limit that is lower than the kernels need, and names the limit.
pub(crate) fn check_limits(limits: &wgpu::Limits) -> Result<()> {
    let (workgroup, params) = (u64::from(WORKGROUP), u64::from(PARAMS_BYTES));
    let needed: [(&str, u64, u64); 15] = [
        // Attention with masks: q, K, V and the result, a list, two masks, and values a head.
        (
            "max_storage_buffers_per_shader_stage",
            limits.max_storage_buffers_per_shader_stage.into(),
            8,
        ),
        (
            "max_storage_buffer_binding_size",
            limits.max_storage_buffer_binding_size,
            CHUNK_BYTES.into(),
        ),
        ("max_buffer_size", limits.max_buffer_size, CHUNK_BYTES.into()),
        ("max_uniform_buffer_binding_size", limits.max_uniform_buffer_binding_size, params),
        (
            "max_uniform_buffers_per_shader_stage",
            limits.max_uniform_buffers_per_shader_stage.into(),
            1,
        ),
        (
            "max_compute_invocations_per_workgroup",
            limits.max_compute_invocations_per_workgroup.into(),
            workgroup,
        ),
        ("max_compute_workgroup_size_x", limits.max_compute_workgroup_size_x.into(), workgroup),
        ("max_compute_workgroup_size_y", limits.max_compute_workgroup_size_y.into(), workgroup),
        ("max_compute_workgroup_size_z", limits.max_compute_workgroup_size_z.into(), 1),
        (
            "max_compute_workgroup_storage_size",
            limits.max_compute_workgroup_storage_size.into(),
            WORKGROUP_BYTES.into(),
        ),
        (
            "max_compute_workgroups_per_dimension",
            limits.max_compute_workgroups_per_dimension.into(),
            1,
        ),
        ("max_bind_groups", limits.max_bind_groups.into(), 3),
        ("max_bindings_per_bind_group", limits.max_bindings_per_bind_group.into(), 7),
        (
            "max_dynamic_storage_buffers_per_pipeline_layout",
            limits.max_dynamic_storage_buffers_per_pipeline_layout.into(),
            1,
        ),
        (
            "max_dynamic_uniform_buffers_per_pipeline_layout",
            limits.max_dynamic_uniform_buffers_per_pipeline_layout.into(),
            1,
        ),
    ];
    match needed.into_iter().find(|&(_, value, needed)| value < needed) {
        Some((limit, value, needed)) => Err(Error::DeviceLimit { limit, value, needed }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// WebGPU's defaults are enough, and not much more than that.
    #[test]
    fn a_device_of_webgpu_is_enough() {
        assert_eq!(check_limits(&wgpu::Limits::default()), Ok(()));
        assert!(check_limits(&wgpu::Limits::downlevel_webgl2_defaults()).is_err());
    }
}
