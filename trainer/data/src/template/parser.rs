//! Parses statements, by jinja2's grammar.

use std::collections::{HashMap, HashSet};

use super::ast::*;
use super::error::TemplateError;
use super::lexer::{Tok, Token, tokens};
use super::scope;

/// A word that ends a tuple, in addition to the end of the tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TupleEnd {
    Tag,
    In,
    Recursive,
}

/// A parsed template: statements, and names by number.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) root: Scope,
    pub(super) names: Vec<String>,
    /// Whether there is a generation block.
    pub(super) marks_generation: bool,
}

pub(super) type Parse<T> = Result<T, TemplateError>;

pub(super) struct Parser {
    tokens: Vec<Token>,
    at: usize,
    numbers: HashMap<String, Name>,
    names: Vec<String>,
    /// Number of enclosing loops within the current macro.
    loops: usize,
    /// Those of `caller`, `varargs` and `kwargs` that the current macro has used so far.
    special: HashSet<String>,
    /// Current nesting depth.
    depth: usize,
    marks_generation: bool,
}

const TAGS_UNSUPPORTED: [&str; 6] = ["autoescape", "block", "extends", "include", "import", "from"];

/// Most levels of nested expressions and tags. Templates of models have about ten; jinja2 stops at Python's recursion limit, near a
/// thousand levels for some constructs and near a hundred for others.
pub(super) const DEEPEST: usize = 200;

pub(super) fn too_deep() -> TemplateError {
    TemplateError::unsupported(format!("more than {DEEPEST} expressions or tags within each other"))
}

/// Parses a template.
pub(super) fn parse(source: &str) -> Parse<Parsed> {
    let mut parser = Parser {
        tokens: tokens(source)?,
        at: 0,
        numbers: HashMap::new(),
        names: Vec::new(),
        loops: 0,
        special: HashSet::new(),
        depth: 0,
        marks_generation: false,
    };
    let (body, _) = parser.statements(&[])?;
    let mut root = Scope { body, unset: Vec::new() };
    scope::analyse(&mut root);
    Ok(Parsed { root, names: parser.names, marks_generation: parser.marks_generation })
}

impl Parser {
    /// Parses a nested part; fails if the nesting is deeper than [`DEEPEST`].
    pub(super) fn nested<T>(&mut self, read: impl FnOnce(&mut Self) -> Parse<T>) -> Parse<T> {
        if self.depth >= DEEPEST {
            return Err(too_deep().at(self.line()));
        }
        self.depth += 1;
        let found = read(self);
        self.depth -= 1;
        found
    }

    pub(super) fn peek(&self) -> &Tok {
        &self.tokens[self.at].tok
    }

    pub(super) fn ahead(&self) -> &Tok {
        self.tokens.get(self.at + 1).map_or(&Tok::Eof, |token| &token.tok)
    }

    pub(super) fn line(&self) -> u32 {
        self.tokens[self.at].line
    }

    pub(super) fn next(&mut self) -> Tok {
        let tok = self.tokens[self.at].tok.clone();
        self.at = (self.at + 1).min(self.tokens.len() - 1);
        tok
    }

    pub(super) fn is_op(&self, operator: &str) -> bool {
        matches!(self.peek(), Tok::Op(found) if *found == operator)
    }

    pub(super) fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Tok::Name(found) if found == word)
    }

    pub(super) fn skip_op(&mut self, operator: &str) -> bool {
        let found = self.is_op(operator);
        if found {
            self.next();
        }
        found
    }

    pub(super) fn skip_word(&mut self, word: &str) -> bool {
        let found = self.is_word(word);
        if found {
            self.next();
        }
        found
    }

    pub(super) fn fail<T>(&self, message: impl Into<String>) -> Parse<T> {
        Err(TemplateError::syntax(message).at(self.line()))
    }

    fn unexpected<T>(&self, wanted: &str) -> Parse<T> {
        let found = match self.peek() {
            Tok::Name(name) => name.clone(),
            Tok::Op(operator) => (*operator).to_owned(),
            Tok::Eof => "the end of the template".to_owned(),
            Tok::BlockEnd | Tok::VariableEnd => "the end of the tag".to_owned(),
            _ => "a value".to_owned(),
        };
        self.fail(format!("expected {wanted}, found {found}"))
    }

    pub(super) fn expect_op(&mut self, operator: &str) -> Parse<()> {
        if self.skip_op(operator) { Ok(()) } else { self.unexpected(&format!("'{operator}'")) }
    }

    fn expect_word(&mut self, word: &str) -> Parse<()> {
        if self.skip_word(word) { Ok(()) } else { self.unexpected(word) }
    }

    pub(super) fn expect_name(&mut self) -> Parse<String> {
        match self.peek() {
            Tok::Name(_) => match self.next() {
                Tok::Name(name) => Ok(name),
                _ => self.unexpected("a name"),
            },
            _ => self.unexpected("a name"),
        }
    }

    fn expect(&mut self, tok: &Tok, wanted: &str) -> Parse<()> {
        if self.peek() != tok {
            return self.unexpected(wanted);
        }
        self.next();
        Ok(())
    }

    /// Returns the number of a name; a new name gets the next number.
    pub(super) fn name(&mut self, name: String) -> Name {
        if matches!(name.as_str(), "caller" | "varargs" | "kwargs") {
            self.special.insert(name.clone());
        }
        if let Some(&number) = self.numbers.get(&name) {
            return number;
        }
        let number = self.names.len() as Name;
        self.names.push(name.clone());
        self.numbers.insert(name, number);
        number
    }

    /// Parses statements up to one of the words `ends`; also returns the word.
    fn statements(&mut self, ends: &[&str]) -> Parse<(Vec<Stmt>, String)> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            match self.next() {
                Tok::Eof if ends.is_empty() => return Ok((body, String::new())),
                Tok::Eof => return self.fail(format!("{} is missing", ends.join(" or "))),
                Tok::Data(text) => body.push(Stmt { line, kind: StmtKind::Data(text) }),
                Tok::VariableBegin => {
                    let value = self.tuple(true, TupleEnd::Tag)?;
                    self.expect(&Tok::VariableEnd, "}}")?;
                    body.push(Stmt { line, kind: StmtKind::Output(value) });
                }
                _ => {
                    if let Some(end) = ends.iter().find(|end| self.is_word(end)) {
                        self.next();
                        return Ok((body, (*end).to_owned()));
                    }
                    self.nested(|parser| parser.statement(line, &mut body))?;
                    self.expect(&Tok::BlockEnd, "%}")?;
                }
            }
        }
    }

    /// Parses the end of a tag, then statements.
    fn block(&mut self, ends: &[&str]) -> Parse<(Vec<Stmt>, String)> {
        self.skip_op(":");
        self.expect(&Tok::BlockEnd, "%}")?;
        self.statements(ends)
    }

    fn scope(&mut self, ends: &[&str]) -> Parse<(Scope, String)> {
        let (body, end) = self.block(ends)?;
        Ok((Scope { body, unset: Vec::new() }, end))
    }

    fn statement(&mut self, line: u32, body: &mut Vec<Stmt>) -> Parse<()> {
        let tag = self.expect_name()?;
        let kind = match tag.as_str() {
            "set" => self.set()?,
            "if" => self.branches()?,
            "for" => self.for_loop()?,
            "with" => self.with()?,
            "macro" => {
                let name = self.expect_name()?;
                let number = self.name(name.clone());
                let parameters = self.signature()?;
                StmtKind::Macro(number, std::sync::Arc::new(self.function(name, parameters, "endmacro")?))
            }
            "call" => {
                let parameters = if self.is_op("(") { self.signature()? } else { Vec::new() };
                let call = self.expression(true)?;
                if !matches!(call.kind, ExprKind::Call(..)) {
                    return self.fail("a call block needs a call");
                }
                let function = self.function("caller".to_owned(), parameters, "endcall")?;
                StmtKind::CallBlock(std::sync::Arc::new(function), call)
            }
            "filter" => {
                let filter = self.filters(None, true)?;
                StmtKind::FilterBlock(filter, self.scope(&["endfilter"])?.0)
            }
            "generation" => {
                self.marks_generation = true;
                StmtKind::Generation(self.alone(|parser| parser.scope(&["endgeneration"]))?.0)
            }
            "print" => return self.print(line, body),
            "break" | "continue" if self.loops == 0 => return self.fail(format!("{tag} outside of a loop")),
            "break" => StmtKind::Break,
            "continue" => StmtKind::Continue,
            _ if TAGS_UNSUPPORTED.contains(&tag.as_str()) => {
                return Err(TemplateError::unsupported(format!("the tag '{tag}'")).at(line));
            }
            _ => return self.fail(format!("unknown tag '{tag}'")),
        };
        body.push(Stmt { line, kind });
        Ok(())
    }

    /// Parses a body in which `break` and `continue` cannot reach the enclosing loop.
    fn alone<T>(&mut self, read: impl FnOnce(&mut Self) -> Parse<T>) -> Parse<T> {
        let loops = std::mem::take(&mut self.loops);
        let read = read(self);
        self.loops = loops;
        read
    }

    fn print(&mut self, line: u32, body: &mut Vec<Stmt>) -> Parse<()> {
        let mut first = true;
        while *self.peek() != Tok::BlockEnd {
            if !std::mem::take(&mut first) {
                self.expect_op(",")?;
            }
            let value = self.expression(true)?;
            body.push(Stmt { line, kind: StmtKind::Output(value) });
        }
        Ok(())
    }

    fn set(&mut self) -> Parse<StmtKind> {
        let target = self.target(TupleEnd::Tag, true)?;
        if self.skip_op("=") {
            return Ok(StmtKind::Set(target, self.tuple(true, TupleEnd::Tag)?));
        }
        let filter = if self.is_op("|") { Some(self.filters(None, false)?) } else { None };
        Ok(StmtKind::SetBlock(target, filter, self.scope(&["endset"])?.0))
    }

    fn branches(&mut self) -> Parse<StmtKind> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false, TupleEnd::Tag)?;
            let (body, end) = self.block(&["elif", "else", "endif"])?;
            branches.push((test, body));
            match end.as_str() {
                "elif" => {}
                "else" => return Ok(StmtKind::If(branches, self.block(&["endif"])?.0)),
                _ => return Ok(StmtKind::If(branches, Vec::new())),
            }
        }
    }

    fn for_loop(&mut self) -> Parse<StmtKind> {
        let target = self.target(TupleEnd::In, false)?;
        self.expect_word("in")?;
        let items = self.tuple(false, TupleEnd::Recursive)?;
        let test = if self.skip_word("if") { Some(self.expression(true)?) } else { None };
        let recursive = self.skip_word("recursive");
        self.loops += 1;
        let body = self.scope(&["endfor", "else"]);
        self.loops -= 1;
        let (body, end) = body?;
        // A `break` in the else block of a loop leaves the enclosing loop.
        let otherwise = if end == "else" { self.scope(&["endfor"])?.0 } else { Scope::default() };
        let number = self.name("loop".to_owned());
        if scope::stores(&target, number) || scope::sets(&body.body, number) {
            return Err(TemplateError::syntax("a loop cannot set 'loop'").at(self.line()));
        }
        if test.as_ref().is_some_and(|test| scope::depends(test, &body.body)) {
            let what = "a loop whose condition may read a namespace that its body sets";
            return Err(TemplateError::unsupported(what).at(self.line()));
        }
        Ok(StmtKind::For(std::sync::Arc::new(For { target, items, test, recursive, body, otherwise })))
    }

    fn with(&mut self) -> Parse<StmtKind> {
        let mut values = Vec::new();
        while *self.peek() != Tok::BlockEnd {
            if !values.is_empty() {
                self.expect_op(",")?;
            }
            let target = self.nested(|parser| parser.target(TupleEnd::Tag, false))?;
            self.expect_op("=")?;
            values.push((target, self.expression(true)?));
        }
        Ok(StmtKind::With(values, self.scope(&["endwith"])?.0))
    }

    fn signature(&mut self) -> Parse<Vec<(Name, String, Option<Expr>)>> {
        self.expect_op("(")?;
        let mut parameters: Vec<(Name, String, Option<Expr>)> = Vec::new();
        while !self.is_op(")") {
            if !parameters.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.expect_name()?;
            if matches!(name.as_str(), "caller" | "varargs" | "kwargs") {
                return Err(TemplateError::unsupported(format!("a parameter '{name}'")).at(self.line()));
            }
            let default = if self.skip_op("=") { Some(self.expression(true)?) } else { None };
            if default.is_none() && parameters.last().is_some_and(|(_, _, default)| default.is_some()) {
                return self.fail("a parameter without default follows one with a default");
            }
            parameters.push((self.name(name.clone()), name, default));
        }
        self.expect_op(")")?;
        Ok(parameters)
    }

    fn function(
        &mut self,
        name: String,
        parameters: Vec<(Name, String, Option<Expr>)>,
        end: &str,
    ) -> Parse<Macro> {
        let outer = std::mem::take(&mut self.special);
        let body = self.alone(|parser| parser.scope(&[end]))?.0;
        let special = std::mem::replace(&mut self.special, outer);
        self.special.extend(special.iter().cloned());
        let mut number = |word: &str| special.contains(word).then(|| self.name(word.to_owned()));
        let (caller, varargs, kwargs) = (number("caller"), number("varargs"), number("kwargs"));
        Ok(Macro { name, parameters, body, caller, varargs, kwargs })
    }

    /// Parses the target of an assignment.
    fn target(&mut self, end: TupleEnd, attributes: bool) -> Parse<Target> {
        let mut targets = Vec::new();
        let mut is_tuple = false;
        loop {
            if !targets.is_empty() {
                self.expect_op(",")?;
            }
            if self.ends(end) {
                break;
            }
            targets.push(self.single_target(attributes)?);
            if !self.is_op(",") {
                break;
            }
            is_tuple = true;
        }
        match targets.pop() {
            None => self.unexpected("a name"),
            Some(target) if !is_tuple => Ok(target),
            Some(target) => {
                targets.push(target);
                Ok(Target::Tuple(targets))
            }
        }
    }

    fn single_target(&mut self, attributes: bool) -> Parse<Target> {
        if self.skip_op("(") {
            let target = self.nested(|parser| parser.target(TupleEnd::Tag, false))?;
            self.expect_op(")")?;
            return Ok(target);
        }
        let name = self.expect_name()?;
        if matches!(name.as_str(), "true" | "false" | "True" | "False" | "none" | "None") {
            return self.fail(format!("cannot assign to {name}"));
        }
        let number = self.name(name);
        if attributes && self.skip_op(".") {
            return Ok(Target::Attr(number, self.expect_name()?));
        }
        Ok(Target::Name(number))
    }
}
