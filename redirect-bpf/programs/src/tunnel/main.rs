//! The eBPF programs around the tunnel between nodes: `strict` drops pods' packets that would cross between nodes in
//! clear text, `clamp` makes TCP segments fit the tunnel. They have maps of their own, apart from those of the
//! redirection, so that neither changes the other's layout.
#![no_std]
#![no_main]

mod clamp;
mod maps;
mod packet;
mod strict;
#[allow(dead_code, reason = "the user's side needs what this side does not")]
mod types;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
