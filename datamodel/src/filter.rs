//! The expression language of `get_all_records_where`.
//!
//! `expr := value "=" value | expr and expr | expr or expr | not expr | true | false | ( expr )`,
//! `value := "literal" | field "name"`. `and` and `or` bind alike, left to right; `not` takes all
//! that follows it. Values are compared as the database spells them.

use crate::errors;
use crate::{ApiError, ClassDef, Key, Value};

const DEEPEST: usize = 64;

/// A parsed expression.
#[derive(Debug, Clone, PartialEq)]
pub struct Filter(Node);

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Constant(bool),
    Equal(Term, Term),
    Not(Box<Node>),
    /// Left to right: the first node, then (is it `and`?, node).
    Chain(Box<Node>, Vec<(bool, Node)>),
}

#[derive(Debug, Clone, PartialEq)]
enum Term {
    Literal(String),
    Field(String),
}

impl Filter {
    /// Parses an expression.
    ///
    /// # Errors
    /// `INVALID_VALUE(expression, reason)`.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let refuse = |reason: &str| errors::invalid_value(text, reason);
        let mut parser = Parser { tokens: tokens(text).map_err(|reason| refuse(&reason))?, at: 0 };
        let node = parser.expression(0).map_err(|reason| refuse(&reason))?;
        if parser.at < parser.tokens.len() {
            return Err(refuse("something follows the expression"));
        }
        Ok(Self(node))
    }

    /// Whether a row's fields satisfy the expression. A field that the class does not have equals nothing.
    #[must_use]
    pub fn matches(&self, class: &ClassDef, fields: &[Value]) -> bool {
        evaluate(&self.0, class, fields)
    }
}

fn evaluate(node: &Node, class: &ClassDef, fields: &[Value]) -> bool {
    match node {
        Node::Constant(truth) => *truth,
        Node::Equal(left, right) => match (term(left, class, fields), term(right, class, fields)) {
            (Some(left), Some(right)) => left == right,
            _ => false,
        },
        Node::Not(inner) => !evaluate(inner, class, fields),
        Node::Chain(first, rest) => rest.iter().fold(evaluate(first, class, fields), |so_far, (both, next)| {
            if *both { so_far && evaluate(next, class, fields) } else { so_far || evaluate(next, class, fields) }
        }),
    }
}

fn term(term: &Term, class: &ClassDef, fields: &[Value]) -> Option<String> {
    match term {
        Term::Literal(text) => Some(text.clone()),
        Term::Field(name) => {
            let index = class.field(name).or_else(|| class.field(&name.replace("__", "_")))?;
            class.field_def(index).filter(|field| !field.hidden)?;
            Some(stored(fields.get(usize::from(index))?))
        }
    }
}

/// A value as the filter language spells it: `true`, `OpaqueRef:…`, `('a' 'b')`, `(('k' 'v'))`.
fn stored(value: &Value) -> String {
    match value {
        Value::Str(text) => text.as_ref().to_owned(),
        Value::Enum(word) => (*word).to_owned(),
        Value::Int(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Bool(truth) => truth.to_string(),
        Value::Time(time) => time.to_string(),
        Value::Ref(reference) => reference.to_string(),
        Value::Set(elements) => {
            let elements: Vec<String> = elements.iter().map(|element| format!("'{}'", stored(element))).collect();
            format!("({})", elements.join(" "))
        }
        Value::Map(entries) => {
            let entries: Vec<String> =
                entries.iter().map(|(key, value)| format!("('{}' '{}')", Key::text(key), stored(value))).collect();
            format!("({})", entries.join(" "))
        }
        Value::Record(_) | Value::Absent | Value::Void => String::new(),
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Literal(String),
    Equals,
    Open,
    Close,
}

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut out = Vec::new();
    let mut rest = text.chars().peekable();
    while let Some(symbol) = rest.next() {
        match symbol {
            ' ' | '\t' | '\n' | '\r' => {}
            '=' => out.push(Token::Equals),
            '(' => out.push(Token::Open),
            ')' => out.push(Token::Close),
            '"' => {
                let mut literal = String::new();
                loop {
                    match rest.next() {
                        Some('"') => break,
                        Some(symbol) => literal.push(symbol),
                        None => return Err("a literal does not end".into()),
                    }
                }
                out.push(Token::Literal(literal));
            }
            symbol if symbol.is_ascii_alphabetic() => {
                let mut word = String::from(symbol);
                while let Some(symbol) = rest.next_if(|symbol| symbol.is_ascii_alphanumeric() || *symbol == '_') {
                    word.push(symbol);
                }
                out.push(Token::Word(word));
            }
            other => return Err(format!("unexpected {other:?}")),
        }
    }
    Ok(out)
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

impl Parser {
    fn next(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.at).cloned();
        self.at += 1;
        token
    }

    fn word(&self) -> Option<&str> {
        match self.tokens.get(self.at) {
            Some(Token::Word(word)) => Some(word),
            _ => None,
        }
    }

    fn expression(&mut self, depth: usize) -> Result<Node, String> {
        if depth > DEEPEST {
            return Err("nested too deeply".into());
        }
        let first = self.operand(depth)?;
        let mut rest = Vec::new();
        while let Some(both) = self.word().and_then(|word| match word {
            "and" => Some(true),
            "or" => Some(false),
            _ => None,
        }) {
            self.at += 1;
            rest.push((both, self.operand(depth)?));
        }
        Ok(if rest.is_empty() { first } else { Node::Chain(Box::new(first), rest) })
    }

    fn operand(&mut self, depth: usize) -> Result<Node, String> {
        match self.next() {
            Some(Token::Word(word)) if word == "true" => Ok(Node::Constant(true)),
            Some(Token::Word(word)) if word == "false" => Ok(Node::Constant(false)),
            Some(Token::Word(word)) if word == "not" => Ok(Node::Not(Box::new(self.expression(depth + 1)?))),
            Some(Token::Open) => {
                let inner = self.expression(depth + 1)?;
                match self.next() {
                    Some(Token::Close) => Ok(inner),
                    _ => Err("a bracket is not closed".into()),
                }
            }
            Some(token) => {
                let left = self.term(Some(token))?;
                match self.next() {
                    Some(Token::Equals) => {}
                    _ => return Err("= expected".into()),
                }
                let right = self.next();
                Ok(Node::Equal(left, self.term(right)?))
            }
            None => Err("the expression ends too soon".into()),
        }
    }

    fn term(&mut self, token: Option<Token>) -> Result<Term, String> {
        match token {
            Some(Token::Literal(text)) => Ok(Term::Literal(text)),
            Some(Token::Word(word)) if word == "field" => match self.next() {
                Some(Token::Literal(name)) => Ok(Term::Field(name)),
                _ => Err("field wants a name in quotes".into()),
            },
            _ => Err("a literal or a field expected".into()),
        }
    }
}
