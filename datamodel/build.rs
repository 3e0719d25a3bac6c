//! Turns the class files into typed Rust: class markers, field ids, enums and error constructors.
//!
//! The class files stay the only source: they are also embedded as text and read at start by
//! `load.rs`, so that the model itself needs no generated tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    println!("cargo:rerun-if-changed=classes");
    println!("cargo:rerun-if-changed=model.toml");
    println!("cargo:rerun-if-changed=errors.toml");
    let root = env::var("CARGO_MANIFEST_DIR")?;
    let root = Path::new(&root);
    let model: toml::Table = fs::read_to_string(root.join("model.toml"))?.parse()?;
    let mut sources = Vec::new();
    for (key, folder) in [("classes", "classes"), ("internal", "classes/internal")] {
        for name in model[key].as_array().ok_or("model.toml: a list is missing")? {
            let name = name.as_str().ok_or("model.toml: a class name is not a string")?;
            let path = root.join(folder).join(format!("{name}.toml"));
            let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            let table: toml::Table = text.parse().map_err(|error| format!("{}: {error}", path.display()))?;
            sources.push((name.to_owned(), text, table));
        }
    }
    let out = env::var("OUT_DIR")?;
    let out = Path::new(&out);
    fs::write(out.join("sources.rs"), source_table(&sources)?)?;
    fs::write(out.join("classes.rs"), class_markers(&sources)?)?;
    fs::write(out.join("enums.rs"), enums(&sources)?)?;
    fs::write(out.join("fields.rs"), fields(&sources)?)?;
    let errors: toml::Table = fs::read_to_string(root.join("errors.toml"))?.parse()?;
    fs::write(out.join("errors.rs"), errors_module(&errors)?)?;
    Ok(())
}

/// A class: its name, its file's text, and what that says.
type Source = (String, String, toml::Table);

fn source_table(sources: &[Source]) -> Result<String, Failure> {
    let mut out = format!("pub(crate) const SOURCES: [(&str, &str); {}] = [\n", sources.len());
    for (name, text, _) in sources {
        // Not by the file's path: checkouts may share what is built, and this one may be gone.
        writeln!(out, "    ({name:?}, {text:?}),")?;
    }
    out.push_str("];\n");
    Ok(out)
}

fn class_markers(sources: &[Source]) -> Result<String, Failure> {
    let mut out = String::new();
    for (index, (name, _, _)) in sources.iter().enumerate() {
        let marker = camel(name);
        writeln!(
            out,
            "/// The class `{name}`.\n#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]\npub enum {marker} {{}}\n\
             impl ClassKind for {marker} {{\n    const ID: ClassId = ClassId({index});\n    const NAME: &'static str = {name:?};\n}}"
        )?;
    }
    Ok(out)
}

fn enums(sources: &[Source]) -> Result<String, Failure> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (class, _, table) in sources {
        for (name, values) in table.get("enums").and_then(|value| value.as_table()).into_iter().flatten() {
            let values = values.as_array().ok_or("an enum is not a list")?;
            let values: Vec<String> = values.iter().filter_map(|value| value.as_str().map(str::to_owned)).collect();
            if let Some(known) = all.get(name)
                && *known != values
            {
                return Err(format!("{class}: enum {name} is declared twice, differently").into());
            }
            all.insert(name.clone(), values);
        }
    }
    let mut out = String::new();
    for (name, values) in &all {
        writeln!(out, "api_enum! {{\n    /// The enum `{name}`.\n    {} {name:?} {{", camel(name))?;
        for value in values {
            writeln!(out, "        {} = {value:?},", camel(value))?;
        }
        out.push_str("    }\n}\n");
    }
    Ok(out)
}

fn fields(sources: &[Source]) -> Result<String, Failure> {
    let mut out = String::new();
    for (class, _, table) in sources {
        let Some(fields) = table.get("fields").and_then(|value| value.as_table()) else {
            continue;
        };
        let marker = camel(class);
        writeln!(out, "/// Fields of `{class}`.\npub mod {} {{\n    use super::*;", snake(class))?;
        for (index, (name, field)) in fields.iter().enumerate() {
            let ty = field.get("type").and_then(|value| value.as_str()).ok_or("a field has no type")?;
            writeln!(
                out,
                "    /// `{class}.{name}`: {}.\n    pub const {}: Field<{marker}, {}> = Field::new({index});",
                ty.replace('<', "&lt;"),
                constant(name),
                rust_type(ty)?
            )?;
        }
        out.push_str("}\n");
    }
    Ok(out)
}

fn errors_module(errors: &toml::Table) -> Result<String, Failure> {
    let mut out = String::new();
    for (code, parameters) in errors {
        let mut names: Vec<String> = Vec::new();
        for (index, parameter) in
            parameters.as_array().ok_or("an error's parameters are not a list")?.iter().enumerate()
        {
            let mut name = identifier(parameter.as_str().unwrap_or_default());
            if name.is_empty() || names.contains(&name) {
                name = format!("{name}_{index}").trim_start_matches('_').to_owned();
                if name.starts_with(|first: char| first.is_ascii_digit()) {
                    name = format!("parameter_{name}");
                }
            }
            names.push(name);
        }
        let arguments: Vec<String> = names.iter().map(|name| format!("{name}: impl Into<String>")).collect();
        let values: Vec<String> = names.iter().map(|name| format!("{name}.into()")).collect();
        let function = code.to_ascii_lowercase();
        let shown: Vec<&str> = parameters.as_array().into_iter().flatten().filter_map(|value| value.as_str()).collect();
        writeln!(
            out,
            "/// The code `{code}`.\npub const {}: &str = {code:?};\n/// `{code}({})`.\npub fn {function}({}) -> ApiError {{\n    ApiError::new({code:?}, vec![{}])\n}}",
            code.to_ascii_uppercase(),
            shown.join(", "),
            arguments.join(", "),
            values.join(", ")
        )?;
    }
    writeln!(
        out,
        "/// Every documented code with the number of its parameters.\npub const ALL: [(&str, usize); {}] = [",
        errors.len()
    )?;
    for (code, parameters) in errors {
        writeln!(out, "    ({code:?}, {}),", parameters.as_array().map_or(0, Vec::len))?;
    }
    out.push_str("];\n");
    Ok(out)
}

fn rust_type(ty: &str) -> Result<String, Failure> {
    let ty = ty.trim();
    Ok(match ty {
        "string" => "String".into(),
        "int" => "i64".into(),
        "float" => "f64".into(),
        "bool" => "bool".into(),
        "datetime" => "Timestamp".into(),
        "<class> record" => "Value".into(),
        _ => {
            if let Some(inner) = ty.strip_suffix(" set") {
                format!("Vec<{}>", rust_type(inner)?)
            } else if let Some(inner) = ty.strip_suffix(" map") {
                let inner = inner.trim_start_matches('(').trim_end_matches(')');
                let (key, value) = inner.split_once(" -> ").ok_or("a map has no arrow")?;
                format!("BTreeMap<{}, {}>", rust_type(key)?, rust_type(value)?)
            } else if ty.ends_with(" option") || ty.ends_with(" record") {
                "Value".into()
            } else if let Some(class) = ty.strip_suffix(" ref") {
                format!("Ref<{}>", camel(class))
            } else if let Some(name) = ty.strip_prefix("enum ") {
                camel(name)
            } else {
                return Err(format!("unknown type {ty}").into());
            }
        }
    })
}

/// `VM_metrics` → `VmMetrics`, `host` → `Host`, `SR` → `Sr`, `balance-slb` → `BalanceSlb`.
fn camel(name: &str) -> String {
    let mut out = String::new();
    for word in name.split(|symbol: char| !symbol.is_ascii_alphanumeric()).filter(|word| !word.is_empty()) {
        let mut letters = word.chars();
        if let Some(first) = letters.next() {
            out.extend(first.to_uppercase());
        }
        let rest: String = letters.collect();
        if word.chars().all(|letter| letter.is_ascii_uppercase() || letter.is_ascii_digit()) {
            out.push_str(&rest.to_ascii_lowercase());
        } else {
            out.push_str(&rest);
        }
    }
    if out.is_empty() {
        return "Empty".into();
    }
    if out.starts_with(|first: char| first.is_ascii_digit()) {
        out.insert(0, 'N');
    }
    if out == "Self" { "SelfValue".into() } else { out }
}

fn snake(name: &str) -> String {
    name.to_ascii_lowercase()
}

fn constant(name: &str) -> String {
    name.to_ascii_uppercase()
}

fn identifier(name: &str) -> String {
    let mut out: String = name
        .trim()
        .to_ascii_lowercase()
        .chars()
        .map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '_' })
        .collect();
    if out.starts_with(|first: char| first.is_ascii_digit()) {
        out.insert(0, 'n');
    }
    match out.as_str() {
        "type" | "ref" | "self" | "use" | "in" | "as" | "mod" | "fn" | "match" => format!("{out}_"),
        _ => out,
    }
}
