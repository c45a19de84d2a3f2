//! Names that are undefined at the start of a scope. jinja2 resolves names before it renders: if a scope sets a name before it reads
//! it, the name is undefined until then, in inner scopes too, even if the conversation has a value for it.

use std::collections::HashSet;
use std::sync::Arc;

use super::ast::*;

/// Fills in [`Scope::unset`] of all scopes.
pub(super) fn analyse(root: &mut Scope) {
    scope(root, &mut Vec::new(), &[]);
}

/// Names of a scope: read or set so far, initially undefined, and set.
#[derive(Clone, Debug, Default)]
struct Symbols {
    known: HashSet<Name>,
    unset: HashSet<Name>,
    stored: HashSet<Name>,
}

type Outer = Vec<HashSet<Name>>;

fn scope(scope: &mut Scope, outer: &mut Outer, parameters: &[Name]) {
    let mut symbols = Symbols::default();
    symbols.known.extend(parameters);
    symbols.stored.extend(parameters);
    statements(&scope.body, &mut symbols, outer);
    scope.unset = symbols.unset.iter().copied().collect();
    scope.unset.sort_unstable();
    outer.push(symbols.known);
    inner(&mut scope.body, outer);
    outer.pop();
}

fn statements(body: &[Stmt], symbols: &mut Symbols, outer: &Outer) {
    for stmt in body {
        match &stmt.kind {
            StmtKind::Data(_) | StmtKind::Break | StmtKind::Continue | StmtKind::Generation(_) => {}
            StmtKind::Output(value) => load(value, symbols),
            StmtKind::Set(target, value) => {
                load(value, symbols);
                store(target, symbols, outer);
            }
            StmtKind::SetBlock(target, _, _) => store(target, symbols, outer),
            StmtKind::If(branches, otherwise) => conditional(branches, otherwise, symbols, outer),
            StmtKind::For(each) => load(&each.items, symbols),
            StmtKind::With(values, _) => values.iter().for_each(|(_, value)| load(value, symbols)),
            StmtKind::Macro(name, _) => store(&Target::Name(*name), symbols, outer),
            StmtKind::CallBlock(_, call) => load(call, symbols),
            StmtKind::FilterBlock(filter, _) => load(filter, symbols),
        }
    }
}

fn conditional(branches: &[(Expr, Vec<Stmt>)], otherwise: &[Stmt], symbols: &mut Symbols, outer: &Outer) {
    let Some(((test, body), others)) = branches.split_first() else {
        return statements(otherwise, symbols, outer);
    };
    load(test, symbols);
    let branch = |fill: &dyn Fn(&mut Symbols)| {
        let mut copy = symbols.clone();
        fill(&mut copy);
        copy
    };
    let parts = [
        branch(&|copy| statements(body, copy, outer)),
        // jinja2 treats the elifs as separate ifs, one after the other, without an else.
        branch(&|copy| {
            for other in others {
                conditional(std::slice::from_ref(other), &[], copy, outer);
            }
        }),
        branch(&|copy| statements(otherwise, copy, outer)),
    ];
    let before = symbols.stored.clone();
    for part in &parts {
        symbols.known.extend(&part.known);
        symbols.unset.extend(&part.unset);
        symbols.stored.extend(&part.stored);
    }
    // A name that only some branches set has its outer value if none of these branches ran.
    for name in symbols.stored.difference(&before) {
        if !parts.iter().all(|part| part.stored.contains(name)) {
            symbols.unset.remove(name);
        }
    }
}

fn store(target: &Target, symbols: &mut Symbols, outer: &Outer) {
    match target {
        Target::Name(name) => {
            symbols.stored.insert(*name);
            if symbols.known.insert(*name) && !outer.iter().any(|known| known.contains(name)) {
                symbols.unset.insert(*name);
            }
        }
        Target::Attr(name, _) => {
            symbols.known.insert(*name);
        }
        Target::Tuple(targets) => targets.iter().for_each(|target| store(target, symbols, outer)),
    }
}

fn load(value: &Expr, symbols: &mut Symbols) {
    names(value, &mut |name| {
        symbols.known.insert(name);
    });
}

fn inner(body: &mut [Stmt], outer: &mut Outer) {
    for stmt in body {
        match &mut stmt.kind {
            StmtKind::SetBlock(_, _, body) | StmtKind::FilterBlock(_, body) | StmtKind::Generation(body) => {
                scope(body, outer, &[]);
            }
            StmtKind::If(branches, otherwise) => {
                branches.iter_mut().for_each(|(_, body)| inner(body, outer));
                inner(otherwise, outer);
            }
            StmtKind::For(each) => {
                if let Some(each) = Arc::get_mut(each) {
                    let parameters = targets(&each.target);
                    scope(&mut each.body, outer, &parameters);
                    scope(&mut each.otherwise, outer, &[]);
                }
            }
            StmtKind::With(values, body) => {
                let parameters: Vec<Name> = values.iter().flat_map(|(target, _)| targets(target)).collect();
                scope(body, outer, &parameters);
            }
            StmtKind::Macro(_, function) | StmtKind::CallBlock(function, _) => {
                if let Some(function) = Arc::get_mut(function) {
                    let special = [function.caller, function.varargs, function.kwargs];
                    let named = function.parameters.iter().map(|(name, _, _)| *name);
                    let parameters: Vec<Name> = named.chain(special.into_iter().flatten()).collect();
                    scope(&mut function.body, outer, &parameters);
                }
            }
            _ => {}
        }
    }
}

fn targets(target: &Target) -> Vec<Name> {
    match target {
        Target::Name(name) => vec![*name],
        Target::Attr(..) => Vec::new(),
        Target::Tuple(all) => all.iter().flat_map(targets).collect(),
    }
}

/// Whether a target assigns to the name.
pub(super) fn stores(target: &Target, name: Name) -> bool {
    targets(target).contains(&name)
}

/// Whether statements assign to the name.
pub(super) fn sets(body: &[Stmt], name: Name) -> bool {
    body.iter().any(|stmt| match &stmt.kind {
        StmtKind::Set(target, _) | StmtKind::SetBlock(target, _, _) => stores(target, name),
        StmtKind::If(branches, otherwise) => {
            branches.iter().any(|(_, body)| sets(body, name)) || sets(otherwise, name)
        }
        StmtKind::With(_, body) | StmtKind::FilterBlock(_, body) | StmtKind::Generation(body) => {
            sets(&body.body, name)
        }
        _ => false,
    })
}

/// Whether a loop's condition may read a namespace that the body sets: jinja2 evaluates the condition between iterations.
pub(super) fn depends(test: &Expr, body: &[Stmt]) -> bool {
    let mut changed = HashSet::new();
    namespaces(body, &mut changed);
    let mut reads = false;
    names(test, &mut |name| reads |= changed.contains(&name));
    reads
}

fn namespaces(body: &[Stmt], changed: &mut HashSet<Name>) {
    for stmt in body {
        match &stmt.kind {
            StmtKind::Set(Target::Attr(name, _), _) | StmtKind::SetBlock(Target::Attr(name, _), _, _) => {
                changed.insert(*name);
            }
            StmtKind::If(branches, otherwise) => {
                branches.iter().for_each(|(_, body)| namespaces(body, changed));
                namespaces(otherwise, changed);
            }
            StmtKind::For(each) => namespaces(&each.body.body, changed),
            StmtKind::With(_, body) | StmtKind::FilterBlock(_, body) | StmtKind::Generation(body) => {
                namespaces(&body.body, changed);
            }
            _ => {}
        }
    }
}

/// Visits the names that an expression reads, in order.
fn names(value: &Expr, visit: &mut dyn FnMut(Name)) {
    match &value.kind {
        ExprKind::Const(_) => {}
        ExprKind::Name(name) => visit(*name),
        ExprKind::Attr(value, _) | ExprKind::Not(value) | ExprKind::Neg(value) | ExprKind::Pos(value) => {
            names(value, visit);
        }
        ExprKind::Item(left, right)
        | ExprKind::Math(_, left, right)
        | ExprKind::And(left, right)
        | ExprKind::Or(left, right) => {
            names(left, visit);
            names(right, visit);
        }
        ExprKind::Slice(value, parts) => {
            names(value, visit);
            parts.iter().flatten().for_each(|part| names(part, visit));
        }
        ExprKind::Call(callee, arguments) | ExprKind::Test(callee, _, arguments) => {
            names(callee, visit);
            argument_names(arguments, visit);
        }
        ExprKind::Filter(input, _, arguments) => {
            input.iter().for_each(|input| names(input, visit));
            argument_names(arguments, visit);
        }
        ExprKind::Concat(items) | ExprKind::List(items) | ExprKind::Tuple(items) => {
            items.iter().for_each(|item| names(item, visit));
        }
        ExprKind::Compare(first, others) => {
            names(first, visit);
            others.iter().for_each(|(_, other)| names(other, visit));
        }
        ExprKind::Cond(test, value, other) => {
            names(test, visit);
            names(value, visit);
            other.iter().for_each(|other| names(other, visit));
        }
        ExprKind::Dict(items) => items.iter().for_each(|(key, value)| {
            names(key, visit);
            names(value, visit);
        }),
    }
}

fn argument_names(arguments: &Arguments, visit: &mut dyn FnMut(Name)) {
    let named = arguments.named.iter().map(|(_, value)| value);
    let all = arguments.positional.iter().chain(named).chain(&arguments.rest).chain(&arguments.named_rest);
    all.for_each(|value| names(value, visit));
}
