// Lexer and recursive-descent parser of PTX. Source: PTX ISA 8.8, sections 4 (syntax), 5 (state spaces, types) and 11
// (directives).
#include "gpusim/ptx.h"

#include <cctype>
#include <cstring>

namespace gpusim {

bool Instruction::has(const char* modifier) const {
  for (const auto& m : modifiers)
    if (m == modifier) return true;
  return false;
}

const Function* Module::entry(const std::string& name) const {
  for (const auto& f : functions)
    if (f.entry && f.name == name) return &f;
  return nullptr;
}

const Function* Module::function(const std::string& name) const {
  for (const auto& f : functions)
    if (!f.entry && f.name == name) return &f;
  return nullptr;
}

uint64_t Module::address_of(const std::string& name) const {
  const Function* f = function(name);
  return f == nullptr ? 0 : 16 * static_cast<uint64_t>(f - functions.data() + 1);
}

int type_bytes(const std::string& type) {
  static const std::map<std::string, int> sizes = {{"pred", 0}, {"b8", 1},  {"u8", 1},  {"s8", 1},    {"b16", 2},
                                                   {"u16", 2},  {"s16", 2}, {"f16", 2}, {"bf16", 2},  {"b32", 4},
                                                   {"u32", 4},  {"s32", 4}, {"f32", 4}, {"f16x2", 4}, {"bf16x2", 4},
                                                   {"b64", 8},  {"u64", 8}, {"s64", 8}, {"f64", 8},   {"b128", 16}};
  const auto it = sizes.find(type);
  return it == sizes.end() ? -1 : it->second;
}

namespace {

struct Token {
  enum Kind { kEnd, kWord, kDirective, kInt, kFloat32, kFloat64, kString, kPunct } kind = kEnd;
  std::string text;
  uint64_t bits = 0;
  int line = 0;
  size_t begin = 0, end = 0;
};

bool word_start(char c) { return isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%'; }
bool word_char(char c) { return isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$'; }

class Lexer {
 public:
  explicit Lexer(const std::string& text) : text_(text) { advance(); }

  const Token& peek() const { return token_; }
  Token next() {
    Token t = token_;
    last_end_ = t.end;
    advance();
    return t;
  }
  size_t last_end() const { return last_end_; }
  const std::string& text() const { return text_; }

 private:
  void skip_blank() {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '\n') {
        ++line_, ++at_;
      } else if (isspace(static_cast<unsigned char>(c))) {
        ++at_;
      } else if (text_.compare(at_, 2, "//") == 0) {
        while (at_ < text_.size() && text_[at_] != '\n') ++at_;
      } else if (text_.compare(at_, 2, "/*") == 0) {
        const size_t end = text_.find("*/", at_ + 2);
        if (end == std::string::npos) throw PtxError(line_, "comment without an end");
        for (; at_ < end + 2; ++at_) line_ += text_[at_] == '\n';
      } else {
        return;
      }
    }
  }

  void advance() {
    skip_blank();
    token_ = Token{};
    token_.line = line_;
    token_.begin = at_;
    if (at_ >= text_.size()) {
      token_.end = at_;
      return;
    }
    const char c = text_[at_];
    if (word_start(c)) {
      token_.kind = Token::kWord;
      do ++at_;
      while (at_ < text_.size() && word_char(text_[at_]));
    } else if (c == '.' && at_ + 1 < text_.size() && word_start(text_[at_ + 1])) {
      token_.kind = Token::kDirective;
      do ++at_;
      while (at_ < text_.size() && (word_char(text_[at_]) || text_.compare(at_, 2, "::") == 0 ||
                                    (text_[at_] == ':' && text_[at_ - 1] == ':')));
    } else if (isdigit(static_cast<unsigned char>(c))) {
      number();
    } else if (c == '"') {
      token_.kind = Token::kString;
      const size_t end = text_.find('"', at_ + 1);
      if (end == std::string::npos) throw PtxError(line_, "string without an end");
      at_ = end + 1;
    } else {
      token_.kind = Token::kPunct;
      ++at_;
    }
    token_.end = at_;
    token_.text = text_.substr(token_.begin, token_.end - token_.begin);
  }

  void number() {
    const char* begin = text_.c_str() + at_;
    char* end = nullptr;
    if (begin[0] == '0' && strchr("fFdD", begin[1]) && begin[1] != 0) {
      const bool wide = begin[1] == 'd' || begin[1] == 'D';
      size_t digits = 0;
      while (isxdigit(static_cast<unsigned char>(begin[2 + digits]))) ++digits;
      if (digits != (wide ? 16u : 8u)) throw PtxError(line_, "a hexadecimal float needs 8 (0f) or 16 (0d) digits");
      token_.bits = strtoull(std::string(begin + 2, digits).c_str(), nullptr, 16);
      token_.kind = wide ? Token::kFloat64 : Token::kFloat32;
      at_ += 2 + digits;
      return;
    }
    token_.kind = Token::kInt;
    if (begin[0] == '0' && (begin[1] == 'b' || begin[1] == 'B'))
      token_.bits = strtoull(begin + 2, &end, 2);
    else
      token_.bits = strtoull(begin, &end, 0);
    if (*end == '.' && isdigit(static_cast<unsigned char>(end[1]))) {
      const double value = strtod(begin, &end);
      memcpy(&token_.bits, &value, 8);
      token_.kind = Token::kFloat64;
    }
    at_ += static_cast<size_t>(end - begin);
    if (at_ < text_.size() && text_[at_] == 'U') ++at_;
  }

  const std::string& text_;
  size_t at_ = 0, last_end_ = 0;
  int line_ = 1;
  Token token_;
};

class Parser {
 public:
  explicit Parser(const std::string& text) : lexer_(text) {}

  Module run() {
    while (lexer_.peek().kind != Token::kEnd) top_level();
    return std::move(module_);
  }

 private:
  // ---- tokens
  const Token& peek() const { return lexer_.peek(); }
  Token next() { return lexer_.next(); }
  bool at(const char* text) const { return peek().kind != Token::kEnd && peek().text == text; }
  bool accept(const char* text) {
    if (!at(text)) return false;
    next();
    return true;
  }
  void expect(const char* text) {
    if (!accept(text)) fail(std::string("expected ") + text + ", got " + describe(peek()));
  }
  static std::string describe(const Token& t) {
    return t.kind == Token::kEnd ? "the end of the text" : "'" + t.text + "'";
  }
  [[noreturn]] void fail(const std::string& what) const { throw PtxError(peek().line, what); }
  uint64_t integer() {
    const bool negative = accept("-");
    if (peek().kind != Token::kInt) fail("expected an integer, got " + describe(peek()));
    const uint64_t v = next().bits;
    return negative ? 0 - v : v;
  }
  uint64_t alignment() {
    const uint64_t n = integer();
    if (n == 0 || n > 4096 || (n & (n - 1)) != 0) fail("expected an alignment: a power of two up to 4096");
    return n;
  }
  std::string word() {
    if (peek().kind != Token::kWord) fail("expected a name, got " + describe(peek()));
    return next().text;
  }

  // ---- module
  void top_level() {
    const Token t = next();
    if (t.kind != Token::kDirective) throw PtxError(t.line, "expected a directive, got " + describe(t));
    const std::string& d = t.text;
    if (d == ".version") {
      module_.version = peek().text;
      next();
    } else if (d == ".target") {
      module_.target = word();
      while (accept(",")) word();
    } else if (d == ".address_size") {
      if (integer() != 64) throw PtxError(t.line, "unsupported: .address_size other than 64");
    } else if (d == ".file") {
      file();
    } else if (d == ".section") {
      section();
    } else if (d == ".pragma") {
      pragma();
    } else if (d == ".visible" || d == ".weak" || d == ".common") {
    } else if (d == ".extern") {
      external_ = true;
      return;
    } else if (d == ".entry" || d == ".func") {
      function(d == ".entry");
    } else if (d == ".global" || d == ".const" || d == ".shared") {
      variables(d, module_.variables);
    } else {
      throw PtxError(t.line, "unsupported: directive " + d);
    }
    external_ = false;
  }

  void file() {
    const int index = static_cast<int>(integer());
    if (peek().kind != Token::kString) fail("expected a file name, got " + describe(peek()));
    const std::string quoted = next().text;
    module_.files[index] = quoted.substr(1, quoted.size() - 2);
    while (accept(",")) integer();
  }

  void section() {  // debug sections are data that nothing executed refers to
    next();
    while (!at("{")) next_or_fail();
    int depth = 0;
    do {
      if (at("{")) ++depth;
      if (at("}")) --depth;
      next_or_fail();
    } while (depth > 0);
  }
  void next_or_fail() {
    if (peek().kind == Token::kEnd) fail("unexpected end of the text");
    next();
  }

  void pragma() {
    if (peek().kind != Token::kString) fail("expected a string after .pragma, got " + describe(peek()));
    const std::string text = next().text;
    const char* key = "\"used_bytes_mask ";
    if (text.rfind(key, 0) == 0) used_bytes_ = strtoull(text.c_str() + strlen(key), nullptr, 0);
    while (accept(",")) next();
    expect(";");
  }

  // .shared .align 16 .b8 name[N], ...;  with initialisers for .global and .const
  void variables(const std::string& space, std::vector<Variable>& into) {
    Variable v;
    v.external = external_;
    v.space = space == ".global"  ? Variable::kGlobal
              : space == ".const" ? Variable::kConst
              : space == ".local" ? Variable::kLocal
              : space == ".param" ? Variable::kParam
                                  : Variable::kShared;
    v.align = 0;
    uint64_t vector = 1;
    for (;;) {
      if (accept(".align")) {
        v.align = alignment();
      } else if (accept(".v2")) {
        vector = 2;
      } else if (accept(".v4")) {
        vector = 4;
      } else if (peek().kind == Token::kDirective) {
        v.type = next().text.substr(1);
        if (type_bytes(v.type) <= 0) fail("unsupported: variable of type ." + v.type);
      } else {
        break;
      }
    }
    if (v.type.empty()) fail("a variable without a type");
    const uint64_t element = static_cast<uint64_t>(type_bytes(v.type)) * vector;
    if (v.align == 0) v.align = element;
    do {
      Variable one = v;
      one.name = declare(word());
      while (accept("[")) {
        const uint64_t n = at("]") ? 0 : integer();
        one.count = n > (1ull << 28) ? n : one.count * n;
        expect("]");
      }
      if (one.count > (1ull << 28)) fail("variable " + one.name + " is too large");
      one.bytes = one.count * element;
      if (accept("=")) initialiser(one);
      into.push_back(one);
    } while (accept(","));
    expect(";");
  }

  // Numbers, and addresses of variables and functions: name, name+8, generic(name).
  void initialiser(Variable& v) {
    const auto element = static_cast<size_t>(type_bytes(v.type));
    std::vector<uint8_t> bytes;
    const auto append = [&](uint64_t bits) {
      for (size_t i = 0; i < element; ++i) bytes.push_back(static_cast<uint8_t>(bits >> (8 * i)));
    };
    const auto address = [&] {
      const bool generic = at("generic");
      std::string symbol = word();
      if (generic) expect("("), symbol = word(), expect(")");
      if (element != 8) fail("unsupported: the address of " + symbol + " in a variable of type ." + v.type);
      v.relocations.push_back({bytes.size(), symbol, offset()});
      append(0);
    };
    const auto value = [&] {
      if (peek().kind == Token::kWord) return address();
      const bool negative = accept("-");
      const Token t = next();
      if (t.kind != Token::kInt && t.kind != Token::kFloat32 && t.kind != Token::kFloat64)
        throw PtxError(t.line, "unsupported: initialiser " + describe(t));
      uint64_t bits = negative ? 0 - t.bits : t.bits;
      const bool is_float = v.type == "f32" || v.type == "f64";
      if (is_float != (t.kind != Token::kInt) || (v.type == "f32" && t.kind == Token::kFloat64) ||
          (v.type == "f64" && t.kind == Token::kFloat32))
        throw PtxError(t.line, "unsupported: initialiser " + describe(t) + " for ." + v.type);
      if (is_float && negative) bits = t.bits ^ 1ull << (v.type == "f32" ? 31 : 63);
      append(bits);
    };
    if (accept("{")) {
      while (!at("}")) {
        if (at("{")) fail("unsupported: nested initialisers");
        if (!accept(",")) value();
      }
      expect("}");
    } else {
      value();
    }
    if (v.bytes == 0) v.bytes = bytes.size();
    if (bytes.size() > v.bytes) fail("more initial values than elements in " + v.name);
    bytes.resize(v.bytes);
    v.initial = std::move(bytes);
  }

  // ---- functions
  void function(bool entry) {
    Function f;
    f.entry = entry;
    f.line = peek().line;
    scopes_.assign(1, Scope{});
    open_.assign(1, 0);
    function_ = &f;
    if (accept("(")) parameters(f.returns);
    f.name = word();
    if (accept("(")) parameters(f.params);
    while (!at("{") && !at(";")) {
      const Token t = next();
      if (t.kind == Token::kEnd) fail("unexpected end of the text");
      if (t.text == ".reqntid") {
        f.reqntid = static_cast<int>(integer());
        while (accept(",")) f.reqntid *= static_cast<int>(integer());
      }
    }
    if (accept(";")) {
      function_ = nullptr;
      return;
    }
    expect("{");
    location_ = -1;
    while (!open_.empty()) statement(f);
    resolve_labels(f);
    function_ = nullptr;
    module_.functions.push_back(std::move(f));
  }

  // Labels are used before they are declared, and belong to the {} that they stand in.
  void resolve_labels(Function& f) const {
    const auto resolved = [&](int scope, const std::string& name) {
      for (; scope >= 0; scope = scopes_[static_cast<size_t>(scope)].parent)
        if (f.labels.count(scoped(name, scope))) return scoped(name, scope);
      return name;
    };
    for (Instruction& in : f.body)
      if (in.opcode == "bra" && in.operands.size() == 1) in.operands[0].name = resolved(in.scope, in.operands[0].name);
  }
  static std::string scoped(const std::string& name, int scope) {
    return scope == 0 ? name : name + "@" + std::to_string(scope);
  }

  void parameters(std::vector<Variable>& into) {
    while (!accept(")")) {
      if (peek().kind == Token::kEnd) fail("unexpected end of the text");
      accept(",");
      expect(".param");
      Variable v;
      v.space = Variable::kParam;
      v.align = 0;
      while (peek().kind == Token::kDirective) {
        if (accept(".align")) {
          v.align = alignment();
        } else if (accept(".ptr")) {
          while (at(".global") || at(".shared") || at(".const") || at(".local")) next();
        } else {
          v.type = next().text.substr(1);
        }
      }
      if (type_bytes(v.type) <= 0) fail("unsupported: parameter of type ." + v.type);
      v.name = word();
      v.bytes = static_cast<uint64_t>(type_bytes(v.type));
      if (v.align == 0) v.align = v.bytes;
      if (accept("[")) {
        const uint64_t n = integer();
        if (n > 4096) fail("parameter " + v.name + " is too large");
        v.bytes *= n;
        expect("]");
      }
      into.push_back(v);
    }
  }

  // Names of an inner scope that hide outer ones get a number.
  std::string declare(const std::string& name) {
    if (function_ == nullptr) return name;
    const std::string unique = scoped(name, open_.back());
    scopes_[static_cast<size_t>(open_.back())].names[name] = unique;
    return unique;
  }
  std::string resolve(const std::string& name) const {
    for (auto id = open_.rbegin(); id != open_.rend(); ++id) {
      const auto& names = scopes_[static_cast<size_t>(*id)].names;
      const auto it = names.find(name);
      if (it != names.end()) return it->second;
    }
    return name;
  }

  void statement(Function& f) {
    const Token t = peek();
    if (t.kind == Token::kEnd) fail("unexpected end of the text inside " + f.name);
    if (accept("{")) {
      scopes_.push_back({open_.back(), {}});
      open_.push_back(static_cast<int>(scopes_.size()) - 1);
    } else if (accept("}")) {
      open_.pop_back();
    } else if (accept(";")) {
    } else if (t.kind == Token::kDirective) {
      directive(f);
    } else if (t.kind == Token::kWord || at("@")) {
      label_or_instruction(f);
    } else {
      fail("expected an instruction, got " + describe(t));
    }
  }

  void directive(Function& f) {
    const Token t = next();
    if (t.text == ".reg") {
      registers(f);
    } else if (t.text == ".shared" || t.text == ".local" || t.text == ".param") {
      variables(t.text, f.variables);
    } else if (t.text == ".loc") {
      location();
    } else if (t.text == ".pragma") {
      pragma();
    } else if (t.text == ".file") {
      file();
    } else if (t.text == ".callprototype") {  // what is called says itself what it takes
      while (!accept(";")) next_or_fail();
    } else if (t.text == ".branchtargets") {
      do f.branch_targets[last_label_].push_back(word());
      while (accept(","));
      expect(";");
    } else {
      throw PtxError(t.line, "unsupported: directive " + t.text);
    }
  }

  void registers(Function& f) {
    std::string type;
    while (peek().kind == Token::kDirective) type = next().text.substr(1);
    if (type_bytes(type) < 0 || type == "b128") fail("unsupported: register of type ." + type);
    do {
      const std::string name = word();
      if (accept("<")) {
        const uint64_t n = integer();
        if (n > 200'000) fail("too many registers");
        for (uint64_t i = 0; i < n; ++i) f.registers[declare(name + std::to_string(i))] = type;
        expect(">");
      } else {
        f.registers[declare(name)] = type;
      }
    } while (accept(","));
    expect(";");
  }

  // .loc file line column[, function_name label[+n], inlined_at file line column]
  void location() {
    Location here{static_cast<int>(integer()), static_cast<int>(integer()), -1};
    integer();
    if (accept(",")) {
      next();  // function_name
      next();  // label
      if (accept("+")) integer();
      if (accept(",")) {
        next();  // inlined_at
        const int file = static_cast<int>(integer()), line = static_cast<int>(integer());
        integer();
        here.outer = outer(file, line);
      }
    }
    location_ = intern(here);
  }
  // Locations of callers are written before those of what was inlined there, so the newest match is the caller.
  int outer(int file, int line) {
    for (int i = static_cast<int>(module_.locations.size()) - 1; i >= 0; --i)
      if (module_.locations[i].file == file && module_.locations[i].line == line) return i;
    return intern({file, line, -1});
  }
  int intern(const Location& location) {
    const auto key = std::make_tuple(location.file, location.line, location.outer);
    const auto [it, fresh] = location_index_.emplace(key, static_cast<int>(module_.locations.size()));
    if (fresh) module_.locations.push_back(location);
    return it->second;
  }

  void label_or_instruction(Function& f) {
    Instruction in;
    in.line = peek().line;
    const size_t begin = peek().begin;
    if (accept("@")) {
      in.guard_negated = accept("!");
      in.guard = resolve(word());
    }
    const std::string name = word();
    if (in.guard.empty() && accept(":")) {
      last_label_ = name;
      if (!f.labels.emplace(scoped(name, open_.back()), static_cast<int>(f.body.size())).second)
        fail("label " + name + " twice");
      return;
    }
    in.opcode = name;
    while (peek().kind == Token::kDirective) {
      std::string text = next().text.substr(1);
      in.modifiers.push_back(text);
    }
    while (!at(";")) {
      if (peek().kind == Token::kEnd || at("}") || at("{")) {
        if (!at("{")) fail("expected ; after " + name);
      }
      in.operands.push_back(operand());
      if (!accept(",") && !at(";")) fail("expected , or ; got " + describe(peek()));
    }
    expect(";");
    in.text = lexer_.text().substr(begin, lexer_.last_end() - begin);
    in.location = location_;
    in.scope = open_.back();
    in.used_bytes = used_bytes_;
    used_bytes_ = ~0ull;
    f.body.push_back(std::move(in));
  }

  Operand operand() {
    Operand o = simple_operand();
    if (accept("|")) {
      Operand pair;
      pair.kind = Operand::kPair;
      pair.list = {o, simple_operand()};
      return pair;
    }
    return o;
  }

  Operand simple_operand() {
    Operand o;
    if (accept("{")) {
      o.kind = Operand::kVector;
      do {
        if (at("{") || at("(")) fail("a list inside a vector");
        o.list.push_back(simple_operand());
      } while (accept(","));
      expect("}");
      if (o.list.size() > 16) fail("a vector of more than 16 elements");
      return o;
    }
    if (accept("(")) {
      o.kind = Operand::kArguments;
      while (!accept(")")) {
        if (!o.list.empty()) expect(",");
        if (at("{") || at("(")) fail("a list inside arguments");
        o.list.push_back(simple_operand());
      }
      return o;
    }
    if (accept("[")) {
      o.kind = Operand::kAddress;
      if (peek().kind == Token::kWord) o.name = name();
      if (o.name.empty()) {
        o.offset = static_cast<int64_t>(integer());
      } else {
        o.offset = offset();
      }
      expect("]");
      return o;
    }
    if (accept("!")) {
      if (peek().kind != Token::kWord) fail("expected a predicate after !, got " + describe(peek()));
      o = simple_operand();
      o.negated = true;
      return o;
    }
    if (peek().kind == Token::kWord) {
      o.kind = Operand::kName;
      o.name = name();
      o.offset = offset();
      return o;
    }
    const bool negative = accept("-");
    const Token t = next();
    o.bits = t.bits;
    if (t.kind == Token::kInt)
      o.kind = Operand::kInt, o.bits = negative ? 0 - t.bits : t.bits;
    else if (t.kind == Token::kFloat32)
      o.kind = Operand::kFloat32, o.bits ^= negative ? 1ull << 31 : 0;
    else if (t.kind == Token::kFloat64)
      o.kind = Operand::kFloat64, o.bits ^= negative ? 1ull << 63 : 0;
    else
      throw PtxError(t.line, "expected an operand, got " + describe(t));
    return o;
  }

  // A register, a symbol, or a special register with its component (%tid.x).
  std::string name() {
    std::string text = word();
    if (text[0] == '%' && peek().kind == Token::kDirective && peek().begin == lexer_.last_end() &&
        (at(".x") || at(".y") || at(".z") || at(".w")))
      text += next().text;
    return resolve(text);
  }

  int64_t offset() {
    uint64_t sum = 0;  // wraps as addresses do
    while (at("+") || at("-")) {
      const bool minus = next().text == "-";
      const uint64_t v = integer();
      sum += minus ? 0 - v : v;
    }
    return static_cast<int64_t>(sum);
  }

  Lexer lexer_;
  Module module_;
  Function* function_ = nullptr;
  struct Scope {
    int parent = -1;
    std::map<std::string, std::string> names;
  };
  std::vector<Scope> scopes_;  // of the function, the first its body
  std::vector<int> open_;      // those that enclose this place
  std::string last_label_;
  std::map<std::tuple<int, int, int>, int> location_index_;
  int location_ = -1;
  bool external_ = false;
  uint64_t used_bytes_ = ~0ull;
};

}  // namespace

Module parse(const std::string& text) { return Parser(text).run(); }

}  // namespace gpusim
