//! Syntax tree of a template.

/// Names are numbers into [`super::parser::Parsed::names`].
pub(super) type Name = u32;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Const {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
}

#[derive(Clone, Debug)]
pub(super) struct Expr {
    pub(super) line: u32,
    pub(super) kind: ExprKind,
    /// Levels of nested expressions, including this one.
    pub(super) depth: usize,
}

#[derive(Clone, Debug)]
pub(super) enum ExprKind {
    Const(Const),
    Name(Name),
    Attr(Box<Expr>, String),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<Expr>, Box<[Option<Expr>; 3]>),
    Call(Box<Expr>, Box<Arguments>),
    /// Input, name, arguments. Without an input, the filter takes the text of a block.
    Filter(Option<Box<Expr>>, String, Box<Arguments>),
    Test(Box<Expr>, String, Box<Arguments>),
    Not(Box<Expr>),
    Neg(Box<Expr>),
    Pos(Box<Expr>),
    Math(Math, Box<Expr>, Box<Expr>),
    Concat(Vec<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    /// Condition, value, value of the else part.
    Cond(Box<Expr>, Box<Expr>, Option<Box<Expr>>),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
}

impl ExprKind {
    /// Levels of nested expressions below this one.
    pub(super) fn depth(&self) -> usize {
        let deepest = |parts: &[Expr]| parts.iter().map(|part| part.depth).max().unwrap_or(0);
        let pair = |a: &Expr, b: &Expr| a.depth.max(b.depth);
        match self {
            Self::Const(_) | Self::Name(_) => 0,
            Self::Attr(value, _) | Self::Not(value) | Self::Neg(value) | Self::Pos(value) => value.depth,
            Self::Item(a, b) | Self::Math(_, a, b) | Self::And(a, b) | Self::Or(a, b) => pair(a, b),
            Self::Slice(value, parts) => {
                parts.iter().flatten().map(|part| part.depth).fold(value.depth, usize::max)
            }
            Self::Call(value, arguments) | Self::Test(value, _, arguments) => {
                value.depth.max(arguments.depth())
            }
            Self::Filter(value, _, arguments) => {
                value.as_ref().map_or(0, |value| value.depth).max(arguments.depth())
            }
            Self::Concat(parts) | Self::List(parts) | Self::Tuple(parts) => deepest(parts),
            Self::Compare(first, others) => {
                others.iter().map(|(_, other)| other.depth).fold(first.depth, usize::max)
            }
            Self::Cond(test, value, other) => {
                pair(test, value).max(other.as_ref().map_or(0, |other| other.depth))
            }
            Self::Dict(pairs) => pairs.iter().map(|(a, b)| pair(a, b)).max().unwrap_or(0),
        }
    }
}

impl Arguments {
    fn depth(&self) -> usize {
        let named = self.named.iter().map(|(_, value)| value);
        let all = self.positional.iter().chain(named).chain(&self.rest).chain(&self.named_rest);
        all.map(|value| value.depth).max().unwrap_or(0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Math {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Mod,
    Pow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Arguments {
    pub(super) positional: Vec<Expr>,
    pub(super) named: Vec<(String, Expr)>,
    /// `*rest`
    pub(super) rest: Option<Expr>,
    /// `**named`
    pub(super) named_rest: Option<Expr>,
}

#[derive(Clone, Debug)]
pub(super) enum Target {
    Name(Name),
    /// Attribute of a namespace.
    Attr(Name, String),
    Tuple(Vec<Target>),
}

/// Statements with a scope of their own.
#[derive(Clone, Debug, Default)]
pub(super) struct Scope {
    pub(super) body: Vec<Stmt>,
    /// Names that are undefined in this scope until they are set, even if the conversation has values for them.
    pub(super) unset: Vec<Name>,
}

#[derive(Clone, Debug)]
pub(super) struct Stmt {
    pub(super) line: u32,
    pub(super) kind: StmtKind,
}

#[derive(Clone, Debug)]
pub(super) enum StmtKind {
    Data(String),
    Output(Expr),
    Set(Target, Expr),
    SetBlock(Target, Option<Expr>, Scope),
    /// Condition and body of each branch, and the else body.
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    For(std::sync::Arc<For>),
    With(Vec<(Target, Expr)>, Scope),
    Macro(Name, std::sync::Arc<Macro>),
    CallBlock(std::sync::Arc<Macro>, Expr),
    FilterBlock(Expr, Scope),
    Generation(Scope),
    Break,
    Continue,
}

#[derive(Clone, Debug)]
pub(super) struct For {
    pub(super) target: Target,
    pub(super) items: Expr,
    pub(super) test: Option<Expr>,
    pub(super) recursive: bool,
    pub(super) body: Scope,
    pub(super) otherwise: Scope,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Macro {
    pub(super) name: String,
    /// Numbers, names and defaults.
    pub(super) parameters: Vec<(Name, String, Option<Expr>)>,
    pub(super) body: Scope,
    /// Numbers of `caller`, `varargs` and `kwargs`; `None` if the body does not use the name.
    pub(super) caller: Option<Name>,
    pub(super) varargs: Option<Name>,
    pub(super) kwargs: Option<Name>,
}
