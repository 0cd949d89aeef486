//! System calls for which no crate has a safe function.
#![allow(unsafe_code)]

pub(crate) mod steering;
