//! The eBPF programs of the redirection, one file for each hook, in the order a connection meets them:
//! `connect` (the application's call), `handoff` (the connection is set up), `inbound` (it arrives at a pod),
//! `peer_name` (someone asks who the peer is), `acceleration` (it carries bytes; only where the self-test allows it).
#![no_std]
#![no_main]

mod acceleration;
mod connect;
mod handoff;
mod inbound;
mod maps;
mod peer_name;
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
