//! Tests of the header that the C++ compiler checks the bridge's definitions against.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

#[path = "../build/header.rs"]
mod header;

#[test]
fn declarations_become_c() {
    let rust = "
        #[repr(C)]
        pub(crate) struct RawBoard {
            pub(crate) board: *mut c_void,
            pub(crate) post: extern \"C\" fn(*mut c_void, RawBytes) -> bool,
        }
        unsafe extern \"C\" {
            pub(crate) fn dyad_x(a: *const C_tensor, list: *const *const C_tensor, y: *mut *mut C_tensor) -> RawError;
            pub(crate) fn dyad_y(hyper: *const f64, handles: *const *mut c_void, n: usize, board: *const RawBoard);
            pub(crate) fn free(pointer: *mut c_void);
        }
    ";
    let header = header::of(rust).unwrap();
    let body = header.split_once("extern \"C\" {\n\n").unwrap().1;
    let expected = "struct dyad_board {\n  void* board;\n  bool (*post)(void*, dyad_bytes);\n};\n\n\
        char* dyad_x(at::Tensor* a, at::Tensor* const* list, at::Tensor** y);\n\
        void dyad_y(const double* hyper, void* const* handles, size_t n, const dyad_board* board);\n\n}  // extern \"C\"\n";
    assert_eq!(body, expected);
}

#[test]
fn types_unknown_to_c_are_refused() {
    for (rust, error) in [
        ("struct RawX { a: u8 }", "RawX crosses to C without #[repr(C)]"),
        ("unsafe extern \"C\" { fn dyad_x(text: &str); }", "a type that C does not have"),
        ("unsafe extern \"C\" { fn dyad_x(text: String); }", "no C type is known for String"),
    ] {
        assert_eq!(header::of(rust).unwrap_err(), error);
    }
}
