//! Makes a C header from the foreign functions and structs that a Rust file declares.

use std::fmt::Write;

use syn::{ForeignItem, ForeignItemFn, Item, ItemStruct, ReturnType, Type};

/// The header text for the declarations in `source`. C++ files include it, so that the compiler checks their definitions.
pub(crate) fn of(source: &str) -> Result<String, String> {
    let file = syn::parse_file(source).map_err(|error| error.to_string())?;
    let mut header = String::from(
        "// Made from src/ffi.rs by build/header.rs.\n#pragma once\n\n#include <cstddef>\n#include <cstdint>\n\n\
         #include <ATen/core/Tensor.h>\n\nextern \"C\" {\n\n",
    );
    for item in &file.items {
        match item {
            Item::Struct(item) => header += &structure(item)?,
            Item::ForeignMod(block) => {
                for item in &block.items {
                    match item {
                        // Functions of the C library: its own headers declare them.
                        ForeignItem::Fn(item) if !item.sig.ident.to_string().starts_with("dyad_") => {}
                        ForeignItem::Fn(item) => header += &function(item)?,
                        _ => return Err("only functions are known in an extern block".into()),
                    }
                }
            }
            _ => {}
        }
    }
    Ok(header + "\n}  // extern \"C\"\n")
}

fn structure(item: &ItemStruct) -> Result<String, String> {
    if !item.attrs.iter().any(|attribute| attribute.path().is_ident("repr")) {
        return Err(format!("{} crosses to C without #[repr(C)]", item.ident));
    }
    let mut text = format!("struct {} {{\n", c_name(&item.ident.to_string()));
    for field in &item.fields {
        let name = field.ident.as_ref().map(ToString::to_string).unwrap_or_default();
        // Writing into a String cannot fail.
        let _ = writeln!(text, "  {};", declared(&field.ty, &name)?);
    }
    Ok(text + "};\n\n")
}

fn function(item: &ForeignItemFn) -> Result<String, String> {
    let mut parameters = Vec::new();
    for input in &item.sig.inputs {
        let syn::FnArg::Typed(input) = input else { return Err("a method crosses to C".into()) };
        let syn::Pat::Ident(name) = &*input.pat else { return Err("a parameter has no name".into()) };
        parameters.push(declared(&input.ty, &name.ident.to_string())?);
    }
    let name = item.sig.ident.to_string();
    Ok(format!("{} {name}({});\n", returned(&item.sig.output)?, parameters.join(", ")))
}

fn returned(output: &ReturnType) -> Result<String, String> {
    match output {
        ReturnType::Default => Ok("void".into()),
        ReturnType::Type(_, ty) => declared(ty, ""),
    }
}

/// A C declaration of `name` with type `ty`; only the type if `name` is empty.
fn declared(ty: &Type, name: &str) -> Result<String, String> {
    let Type::BareFn(function) = ty else {
        let ty = named(ty)?;
        return Ok(if name.is_empty() { ty } else { format!("{ty} {name}") });
    };
    let inputs: Result<Vec<String>, String> =
        function.inputs.iter().map(|input| declared(&input.ty, "")).collect();
    Ok(format!("{} (*{name})({})", returned(&function.output)?, inputs?.join(", ")))
}

/// The C name of a type. Pointers to `at::Tensor` are never const, because libtorch's own handles are not.
fn named(ty: &Type) -> Result<String, String> {
    match ty {
        Type::Ptr(pointer) => {
            let to = named(&pointer.elem)?;
            let is_pointer = matches!(*pointer.elem, Type::Ptr(_));
            let is_tensor = to == "at::Tensor";
            Ok(match (pointer.const_token.is_some() && !is_tensor, is_pointer) {
                (true, true) => format!("{to} const*"),
                (true, false) => format!("const {to}*"),
                (false, _) => format!("{to}*"),
            })
        }
        Type::Path(path) => {
            let name = path.path.segments.last().map(|last| last.ident.to_string()).unwrap_or_default();
            let known = [
                ("bool", "bool"),
                ("c_char", "char"),
                ("c_int", "int"),
                ("c_void", "void"),
                ("f64", "double"),
                ("i64", "int64_t"),
                ("u64", "uint64_t"),
                ("u8", "uint8_t"),
                ("usize", "size_t"),
                ("C_tensor", "at::Tensor"),
                ("RawError", "char*"),
            ];
            match known.into_iter().find(|(rust, _)| *rust == name) {
                Some((_, c)) => Ok(c.into()),
                None if name.starts_with("Raw") => Ok(c_name(&name)),
                None => Err(format!("no C type is known for {name}")),
            }
        }
        _ => Err("a type that C does not have".into()),
    }
}

/// The C name of a Rust struct, e.g. `dyad_board` for `RawBoard`.
fn c_name(rust: &str) -> String {
    let mut name = String::from("dyad");
    for letter in rust.strip_prefix("Raw").unwrap_or(rust).chars() {
        if letter.is_uppercase() {
            name.push('_');
        }
        name.extend(letter.to_lowercase());
    }
    name
}
