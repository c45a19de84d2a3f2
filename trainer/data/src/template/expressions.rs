//! Parses expressions with jinja2's precedence, which differs from Python's (`-2 ** 2` is 4, `~` binds closer than `+`).

use super::ast::*;
use super::error::TemplateError;
use super::lexer::Tok;
use super::parser::{DEEPEST, Parse, Parser, TupleEnd, too_deep};

fn boxed(line: u32, kind: ExprKind) -> Box<Expr> {
    Box::new(Expr { line, kind, depth: 1 })
}

impl Parser {
    pub(super) fn ends(&self, end: TupleEnd) -> bool {
        matches!(self.peek(), Tok::VariableEnd | Tok::BlockEnd)
            || self.is_op(")")
            || end == TupleEnd::In && self.is_word("in")
            || end == TupleEnd::Recursive && self.is_word("recursive")
    }

    /// Parses an expression, or a tuple of expressions with commas between them.
    pub(super) fn tuple(&mut self, conditional: bool, end: TupleEnd) -> Parse<Expr> {
        let line = self.line();
        match self.items(conditional, end)? {
            (mut items, false) => match items.pop() {
                Some(item) => Ok(item),
                None => self.fail("expected an expression"),
            },
            (items, true) => self.expr(line, ExprKind::Tuple(items)),
        }
    }

    fn items(&mut self, conditional: bool, end: TupleEnd) -> Parse<(Vec<Expr>, bool)> {
        let mut items = Vec::new();
        let mut is_tuple = false;
        loop {
            if !items.is_empty() {
                self.expect_op(",")?;
            }
            if self.ends(end) {
                break;
            }
            items.push(self.expression(conditional)?);
            if !self.is_op(",") {
                break;
            }
            is_tuple = true;
        }
        Ok((items, is_tuple))
    }

    pub(super) fn expression(&mut self, conditional: bool) -> Parse<Expr> {
        self.nested(|parser| parser.whole_expression(conditional))
    }

    fn whole_expression(&mut self, conditional: bool) -> Parse<Expr> {
        if !conditional {
            return self.or();
        }
        let line = self.line();
        let mut value = self.or()?;
        while self.skip_word("if") {
            let test = Box::new(self.or()?);
            let other = if self.skip_word("else") { Some(Box::new(self.expression(true)?)) } else { None };
            value = self.expr(line, ExprKind::Cond(test, Box::new(value), other))?;
        }
        Ok(value)
    }

    /// Builds an expression; fails if it is nested too deeply to be evaluated.
    fn expr(&self, line: u32, kind: ExprKind) -> Parse<Expr> {
        let depth = 1 + kind.depth();
        if depth > DEEPEST { Err(too_deep().at(line)) } else { Ok(Expr { line, kind, depth }) }
    }

    fn call(&mut self, line: u32, value: Expr) -> Parse<Expr> {
        let arguments = self.arguments()?;
        self.expr(line, ExprKind::Call(Box::new(value), Box::new(arguments)))
    }

    fn or(&mut self) -> Parse<Expr> {
        let line = self.line();
        let mut left = self.and()?;
        while self.skip_word("or") {
            let right = self.and()?;
            left = self.expr(line, ExprKind::Or(Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn and(&mut self) -> Parse<Expr> {
        let line = self.line();
        let mut left = self.not()?;
        while self.skip_word("and") {
            let right = self.not()?;
            left = self.expr(line, ExprKind::And(Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn not(&mut self) -> Parse<Expr> {
        let line = self.line();
        if self.skip_word("not") {
            let value = self.nested(Self::not)?;
            return self.expr(line, ExprKind::Not(Box::new(value)));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Parse<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut others = Vec::new();
        loop {
            let comparison = match self.peek() {
                Tok::Op("==") => Comparison::Eq,
                Tok::Op("!=") => Comparison::Ne,
                Tok::Op("<") => Comparison::Lt,
                Tok::Op("<=") => Comparison::Le,
                Tok::Op(">") => Comparison::Gt,
                Tok::Op(">=") => Comparison::Ge,
                Tok::Name(name) if name == "in" => Comparison::In,
                Tok::Name(name) if name == "not" && *self.ahead() == Tok::Name("in".to_owned()) => {
                    self.next();
                    Comparison::NotIn
                }
                _ => break,
            };
            self.next();
            others.push((comparison, self.sum()?));
        }
        if others.is_empty() {
            return Ok(first);
        }
        self.expr(line, ExprKind::Compare(Box::new(first), others))
    }

    fn sum(&mut self) -> Parse<Expr> {
        let line = self.line();
        let mut left = self.concatenation()?;
        loop {
            let math = match self.peek() {
                Tok::Op("+") => Math::Add,
                Tok::Op("-") => Math::Sub,
                _ => return Ok(left),
            };
            self.next();
            let right = self.concatenation()?;
            left = self.expr(line, ExprKind::Math(math, Box::new(left), Box::new(right)))?;
        }
    }

    fn concatenation(&mut self) -> Parse<Expr> {
        let line = self.line();
        let first = self.product()?;
        if !self.is_op("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.skip_op("~") {
            parts.push(self.product()?);
        }
        self.expr(line, ExprKind::Concat(parts))
    }

    fn product(&mut self) -> Parse<Expr> {
        let line = self.line();
        let mut left = self.power()?;
        loop {
            let math = match self.peek() {
                Tok::Op("*") => Math::Mul,
                Tok::Op("/") => Math::Div,
                Tok::Op("//") => Math::FloorDiv,
                Tok::Op("%") => Math::Mod,
                _ => return Ok(left),
            };
            self.next();
            let right = self.power()?;
            left = self.expr(line, ExprKind::Math(math, Box::new(left), Box::new(right)))?;
        }
    }

    fn power(&mut self) -> Parse<Expr> {
        let line = self.line();
        let mut left = self.unary(true)?;
        while self.skip_op("**") {
            let right = self.unary(true)?;
            left = self.expr(line, ExprKind::Math(Math::Pow, Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn unary(&mut self, filtered: bool) -> Parse<Expr> {
        let line = self.line();
        let value = if self.skip_op("-") {
            let value = self.nested(|parser| parser.unary(false))?;
            self.expr(line, ExprKind::Neg(Box::new(value)))?
        } else if self.skip_op("+") {
            let value = self.nested(|parser| parser.unary(false))?;
            self.expr(line, ExprKind::Pos(Box::new(value)))?
        } else {
            self.primary()?
        };
        let value = self.postfix(value)?;
        if filtered { self.filtered(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Parse<Expr> {
        let line = self.line();
        let constant = |value| Ok(Expr { line, kind: ExprKind::Const(value), depth: 1 });
        match self.peek() {
            Tok::Name(_) | Tok::Str(_) | Tok::Int(_) | Tok::Float(_) => {}
            Tok::Op("(") => return self.parenthesis(line),
            Tok::Op("[") => return self.list(line),
            Tok::Op("{") => return self.dict(line),
            _ => return self.fail("expected a value"),
        }
        match self.next() {
            Tok::Int(value) => constant(Const::Int(value)),
            Tok::Float(value) => constant(Const::Float(value)),
            Tok::Str(mut text) => {
                while let Tok::Str(more) = self.peek() {
                    text.push_str(more);
                    self.next();
                }
                constant(Const::Str(text))
            }
            Tok::Name(name) => match name.as_str() {
                "true" | "True" => constant(Const::Bool(true)),
                "false" | "False" => constant(Const::Bool(false)),
                "none" | "None" => constant(Const::None),
                "self" | "super" => Err(TemplateError::unsupported(format!("'{name}'")).at(line)),
                _ => Ok(Expr { line, kind: ExprKind::Name(self.name(name)), depth: 1 }),
            },
            _ => self.fail("expected a value"),
        }
    }

    fn parenthesis(&mut self, line: u32) -> Parse<Expr> {
        self.next();
        let (mut items, is_tuple) = self.items(true, TupleEnd::Tag)?;
        self.expect_op(")")?;
        if !is_tuple && let Some(item) = items.pop() {
            return Ok(item);
        }
        self.expr(line, ExprKind::Tuple(items))
    }

    fn list(&mut self, line: u32) -> Parse<Expr> {
        self.next();
        let mut items = Vec::new();
        while !self.is_op("]") {
            if !items.is_empty() {
                self.expect_op(",")?;
            }
            if self.is_op("]") {
                break;
            }
            items.push(self.expression(true)?);
        }
        self.expect_op("]")?;
        self.expr(line, ExprKind::List(items))
    }

    fn dict(&mut self, line: u32) -> Parse<Expr> {
        self.next();
        let mut items = Vec::new();
        while !self.is_op("}") {
            if !items.is_empty() {
                self.expect_op(",")?;
            }
            if self.is_op("}") {
                break;
            }
            let key = self.expression(true)?;
            self.expect_op(":")?;
            items.push((key, self.expression(true)?));
        }
        self.expect_op("}")?;
        self.expr(line, ExprKind::Dict(items))
    }

    fn postfix(&mut self, mut value: Expr) -> Parse<Expr> {
        loop {
            let line = self.line();
            value = if self.skip_op(".") {
                self.attribute(line, value)?
            } else if self.skip_op("[") {
                self.subscript(line, value)?
            } else if self.is_op("(") {
                self.call(line, value)?
            } else {
                return Ok(value);
            };
        }
    }

    fn attribute(&mut self, line: u32, value: Expr) -> Parse<Expr> {
        match self.next() {
            Tok::Name(name) => self.expr(line, ExprKind::Attr(Box::new(value), name)),
            Tok::Int(index) => {
                let index = boxed(line, ExprKind::Const(Const::Int(index)));
                self.expr(line, ExprKind::Item(Box::new(value), index))
            }
            _ => self.fail("expected a name or a number after the dot"),
        }
    }

    fn subscript(&mut self, line: u32, value: Expr) -> Parse<Expr> {
        let mut parts: [Option<Expr>; 3] = [None, None, None];
        let mut part = 0;
        if self.is_op("]") {
            // An empty subscript is an empty tuple in jinja2.
            self.next();
            let empty = boxed(line, ExprKind::Tuple(Vec::new()));
            return self.expr(line, ExprKind::Item(Box::new(value), empty));
        }
        while !self.is_op("]") && part < 3 {
            if self.is_op(",") {
                return Err(TemplateError::unsupported("a subscript with a comma").at(line));
            }
            if !self.is_op(":") {
                parts[part] = Some(self.expression(true)?);
            }
            if !self.skip_op(":") {
                break;
            }
            part += 1;
        }
        if self.is_op(",") {
            return Err(TemplateError::unsupported("a subscript with a comma").at(line));
        }
        self.expect_op("]")?;
        if part == 0
            && let Some(index) = parts[0].take()
        {
            return self.expr(line, ExprKind::Item(Box::new(value), Box::new(index)));
        }
        if part > 2 {
            return self.fail("a slice has at most three parts");
        }
        self.expr(line, ExprKind::Slice(Box::new(value), Box::new(parts)))
    }

    fn arguments(&mut self) -> Parse<Arguments> {
        self.expect_op("(")?;
        let mut arguments = Arguments::default();
        let mut first = true;
        while !self.is_op(")") {
            if !std::mem::take(&mut first) {
                self.expect_op(",")?;
                if self.is_op(")") {
                    break;
                }
            }
            let Arguments { positional, named, rest, named_rest } = &mut arguments;
            let free = named_rest.is_none();
            if self.skip_op("*") {
                if !free || rest.is_some() {
                    return self.fail("a second * in a call");
                }
                *rest = Some(self.expression(true)?);
            } else if self.skip_op("**") {
                if !free {
                    return self.fail("a second ** in a call");
                }
                *named_rest = Some(self.expression(true)?);
            } else if matches!(self.peek(), Tok::Name(_)) && *self.ahead() == Tok::Op("=") {
                if !free {
                    return self.fail("a named argument after **");
                }
                let name = self.expect_name()?;
                self.next();
                named.push((name, self.expression(true)?));
            } else {
                if !free || rest.is_some() || !named.is_empty() {
                    return self.fail("an argument without a name after one with a name");
                }
                positional.push(self.expression(true)?);
            }
        }
        self.expect_op(")")?;
        Ok(arguments)
    }

    fn filtered(&mut self, mut value: Expr) -> Parse<Expr> {
        loop {
            let line = self.line();
            value = if self.is_op("|") {
                self.filters(Some(value), false)?
            } else if self.skip_word("is") {
                self.test(line, value)?
            } else if self.is_op("(") {
                self.call(line, value)?
            } else {
                return Ok(value);
            };
        }
    }

    /// Parses a chain of filters; with `inline` the first one has no `|` before it.
    pub(super) fn filters(&mut self, mut input: Option<Expr>, mut inline: bool) -> Parse<Expr> {
        while inline || self.is_op("|") {
            if !std::mem::take(&mut inline) {
                self.next();
            }
            let line = self.line();
            let name = self.dotted()?;
            let arguments = if self.is_op("(") { self.arguments()? } else { Arguments::default() };
            if !super::filters::NAMES.contains(&name.as_str()) {
                return match super::filters::REFUSED.contains(&name.as_str()) {
                    true => Err(TemplateError::unsupported(format!("the filter '{name}'")).at(line)),
                    // Not a syntax error: jinja2 ignores unknown filters in a branch that does not run.
                    false => Err(TemplateError::unsupported(format!(
                        "the filter '{name}', which jinja2 does not have either,"
                    ))
                    .at(line)),
                };
            }
            input = Some(self.expr(line, ExprKind::Filter(input.map(Box::new), name, Box::new(arguments)))?);
        }
        match input {
            Some(filter) => Ok(filter),
            None => self.fail("expected a filter"),
        }
    }

    fn dotted(&mut self) -> Parse<String> {
        let mut name = self.expect_name()?;
        while self.skip_op(".") {
            name = format!("{name}.{}", self.expect_name()?);
        }
        Ok(name)
    }

    fn test(&mut self, line: u32, value: Expr) -> Parse<Expr> {
        let negated = self.skip_word("not");
        let name = self.dotted()?;
        let mut arguments = Arguments::default();
        if self.is_op("(") {
            arguments = self.arguments()?;
        } else if self.starts_argument() {
            if self.is_word("is") {
                return self.fail("tests cannot be chained");
            }
            let argument = self.primary()?;
            arguments.positional.push(self.postfix(argument)?);
        }
        if !super::tests::NAMES.contains(&name.as_str()) {
            return Err(TemplateError::unsupported(format!(
                "the test '{name}', which jinja2 does not have either,"
            ))
            .at(line));
        }
        let test = self.expr(line, ExprKind::Test(Box::new(value), name, Box::new(arguments)))?;
        if negated { self.expr(line, ExprKind::Not(Box::new(test))) } else { Ok(test) }
    }

    fn starts_argument(&self) -> bool {
        match self.peek() {
            Tok::Name(name) => !matches!(name.as_str(), "else" | "or" | "and"),
            Tok::Str(_) | Tok::Int(_) | Tok::Float(_) => true,
            Tok::Op(operator) => matches!(*operator, "[" | "{"),
            _ => false,
        }
    }
}
