// Command pages checks the pages of the repository, which are its files named *.md:
//
//   - a relative link or picture names a file that exists, and its anchor a heading
//   - a link to a file of this repository on GitHub does too, even in a Go comment
//   - the first paragraph of a page, except the README, says for whom the page is
//   - a Go block is a program that builds or a fragment that parses
//   - a shell block parses, and one that consists of go commands runs without error
//   - the table of CONTRIBUTING.md names files that exist, and every source
//
// A comment <!-- not run: why --> before a shell block keeps it from being run.
// With -n no block is run or built.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

func main() {
	dry := flag.Bool("n", false, "run and build nothing")
	flag.Parse()
	if err := check(*dry); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func check(dry bool) error {
	names, err := find(".")
	if err != nil {
		return err
	}
	pages := make(map[string]*page)
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		pages[name] = read(name, string(text))
	}
	var errs []error
	links, blocks := 0, 0
	for _, name := range names {
		p := pages[name]
		errs = append(errs, p.forWhom())
		for _, l := range p.links {
			links++
			errs = append(errs, l.resolve(p, pages))
		}
	}
	errs = append(errs, covers(pages["CONTRIBUTING.md"]), inComments(pages))
	// Commands run last, so that a broken link is reported at once.
	for _, name := range names {
		for _, b := range pages[name].blocks {
			blocks++
			errs = append(errs, b.check(dry))
		}
	}
	fmt.Printf("%d pages, %d links, %d blocks\n", len(names), links, blocks)
	return errors.Join(errs...)
}

// find returns the pages below root.
func find(root string) (names []string, err error) {
	err = filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (strings.HasPrefix(d.Name(), ".") && name != root || d.Name() == "testdata" || d.Name() == "node_modules"):
			return filepath.SkipDir
		case !d.IsDir() && strings.HasSuffix(name, ".md"):
			names = append(names, filepath.ToSlash(name))
		}
		return nil
	})
	if err == nil && len(names) == 0 {
		err = errors.New("there are no pages here: run pages at the root of the repository")
	}
	return names, err
}

// A page is one file.
type page struct {
	name    string
	intro   string          // the first paragraph
	anchors map[string]bool // of its headings
	links   []link
	blocks  []block
	files   []string // Go files that its tables name, as patterns
}

// A link is the target of a link or picture.
type link struct {
	line   int
	target string
}

// A block is a fenced code block.
type block struct {
	page   string
	line   int
	kind   string // the word after the fence: sh, go, ...
	text   string
	notRun string // the reason not to run it
}

var (
	fence    = regexp.MustCompile("^\\s*```(\\w*)$")
	heading  = regexp.MustCompile(`^#{1,6} +(.*?) *#*$`)
	notRun   = regexp.MustCompile(`^<!-- not run: (.+) -->$`)
	inline   = regexp.MustCompile("`[^`]*`")
	linkTo   = regexp.MustCompile(`\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)`)
	linkText = regexp.MustCompile(`!?\[([^\]]*)\]\([^)]*\)`)
	goFile   = regexp.MustCompile("`([\\w*]+\\.go)`")
	define   = regexp.MustCompile(`^\[[^\]]+\]: +(\S+)$`)
)

// read parses the parts of a page that are checked.
func read(name, text string) *page {
	p := &page{name: name, anchors: map[string]bool{}}
	var open *block
	var why string
	number, intro := 0, false
	for line := range strings.Lines(text) {
		number++
		line = strings.TrimRight(line, "\n")
		if m := fence.FindStringSubmatch(line); m != nil {
			if open != nil {
				p.blocks = append(p.blocks, *open)
				open, why = nil, ""
			} else {
				open = &block{page: name, line: number, kind: m[1], notRun: why}
			}
			continue
		}
		if open != nil {
			open.text += line + "\n"
			continue
		}
		if m := notRun.FindStringSubmatch(line); m != nil {
			why = m[1]
		} else if line != "" {
			why = ""
		}
		if m := heading.FindStringSubmatch(line); m != nil {
			p.anchors[unused(p.anchors, slug(m[1]))] = true
			continue
		}
		switch {
		case line != "" && (p.intro == "" || intro):
			p.intro += line + " "
			intro = true
		case line == "":
			intro = false
		}
		if strings.HasPrefix(line, "|") {
			for _, m := range goFile.FindAllStringSubmatch(line, -1) {
				p.files = append(p.files, m[1])
			}
		}
		for _, m := range linkTo.FindAllStringSubmatch(inline.ReplaceAllString(line, "``"), -1) {
			p.links = append(p.links, link{number, m[1]})
		}
		if m := define.FindStringSubmatch(line); m != nil {
			p.links = append(p.links, link{number, m[1]})
		}
	}
	if open != nil {
		open.kind = "not closed"
		p.blocks = append(p.blocks, *open)
	}
	return p
}

// slug returns the anchor that GitHub gives to a heading.
func slug(text string) string {
	text = strings.ToLower(strings.ReplaceAll(linkText.ReplaceAllString(text, "$1"), "`", ""))
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r > 0x7f:
			return r
		}
		return -1
	}, text)
}

// unused returns anchor, with a number appended if the page already has it.
func unused(anchors map[string]bool, anchor string) string {
	name := anchor
	for i := 1; anchors[name]; i++ {
		name = fmt.Sprintf("%s-%d", anchor, i)
	}
	return name
}

func (p *page) forWhom() error {
	if p.name == "README.md" || strings.HasPrefix(p.intro, "This page is for ") {
		return nil
	}
	return fmt.Errorf("%s: the first paragraph does not begin with \"This page is for\"", p.name)
}

// covers checks that each file name in the tables of p matches a file of the root, and
// that they match every source there.
func covers(p *page) error {
	if p == nil {
		return errors.New("there is no CONTRIBUTING.md")
	}
	var errs []error
	named := make(map[string]bool)
	for _, pattern := range p.files {
		files, err := filepath.Glob(pattern)
		if err == nil && len(files) == 0 {
			err = errors.New("matches no file")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %s: %w", p.name, pattern, err))
		}
		for _, file := range files {
			named[file] = true
		}
	}
	sources, err := filepath.Glob("*.go")
	errs = append(errs, err)
	for _, file := range sources {
		if !named[file] && !strings.HasSuffix(file, "_test.go") {
			errs = append(errs, fmt.Errorf("%s: no table names %s", p.name, file))
		}
	}
	return errors.Join(errs...)
}

// inComments checks the links that comments of Go files define, as go doc reads them.
func inComments(pages map[string]*page) error {
	files, err := filepath.Glob("*.go")
	more, moreErr := filepath.Glob("*/*.go")
	errs := []error{err, moreErr}
	for _, file := range append(files, more...) {
		text, err := os.ReadFile(file)
		errs = append(errs, err)
		number := 0
		for line := range strings.Lines(string(text)) {
			number++
			comment, ok := strings.CutPrefix(strings.TrimSpace(line), "// ")
			if m := define.FindStringSubmatch(comment); ok && m != nil {
				errs = append(errs, link{number, m[1]}.resolve(&page{name: filepath.ToSlash(file)}, pages))
			}
		}
	}
	return errors.Join(errs...)
}

// here are the addresses of this repository's files.
var here = regexp.MustCompile(`^https://github\.com/acceptq/acceptq/(?:blob|tree)/main/(.*)$`)

// resolve checks that the target exists, if it is a file of the repository.
func (l link) resolve(p *page, pages map[string]*page) error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("%s:%d: link to %s: %s", p.name, l.line, l.target, fmt.Sprintf(format, args...))
	}
	target, from := l.target, path.Dir(p.name)
	if m := here.FindStringSubmatch(target); m != nil {
		target, from = m[1], "."
	} else if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
		return nil
	}
	file, anchor, _ := strings.Cut(target, "#")
	name := p.name
	if file != "" {
		name = path.Join(from, file)
		if _, err := os.Stat(name); err != nil {
			return fail("%v", err)
		}
	}
	if anchor == "" {
		return nil
	}
	switch other := pages[name]; {
	case other == nil:
		return fail("%s is not a page", name)
	case !other.anchors[anchor]:
		return fail("%s has no heading %s", name, anchor)
	}
	return nil
}

func (b block) check(dry bool) error {
	var err error
	switch b.kind {
	case "go":
		err = b.checkGo(dry)
	case "sh", "bash":
		err = b.checkShell(dry)
	case "not closed":
		err = errors.New("the block is not closed")
	}
	if err != nil {
		return fmt.Errorf("%s:%d: %w", b.page, b.line, err)
	}
	return nil
}

// checkGo builds a program in a folder of this module, and parses a fragment.
func (b block) checkGo(dry bool) error {
	if !strings.HasPrefix(b.text, "package ") {
		body := "package p\n\nfunc _() {\n" + b.text + "\n}\n"
		_, err := parser.ParseFile(token.NewFileSet(), "fragment", body, 0)
		if err != nil { // or a list of declarations
			_, err = parser.ParseFile(token.NewFileSet(), "fragment", "package p\n\n"+b.text, 0)
		}
		return err
	}
	if dry {
		return nil
	}
	dir, err := os.MkdirTemp(".", ".pages")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(b.text), 0o666); err != nil {
		return err
	}
	return run("go", "vet", "./"+dir)
}

// checkShell parses a block, and runs it if it can run anywhere.
func (b block) checkShell(dry bool) error {
	cmd := exec.Command("bash", "-n")
	cmd.Stdin = strings.NewReader(b.text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("bash -n: %w\n%s", err, out)
	}
	switch {
	case dry:
	case b.notRun != "":
		fmt.Printf("%s:%d: not run: %s\n", b.page, b.line, b.notRun)
	case b.runs():
		fmt.Printf("%s:%d: runs\n", b.page, b.line)
		return run("bash", "-euo", "pipefail", "-c", b.text)
	}
	return nil
}

// runs reports whether all commands can run anywhere: they change nothing outside the
// build cache, and need no privilege and no other program.
func (b block) runs() bool {
	some := false
	for line := range strings.Lines(b.text) {
		words := strings.Fields(line)
		words = slices.DeleteFunc(words, func(w string) bool { return strings.Contains(w, "=") && !strings.HasPrefix(w, "-") })
		switch {
		case len(words) == 0 || strings.HasPrefix(words[0], "#"):
		case words[0] == "cd":
		case words[0] == "go" && len(words) > 1 && slices.Contains([]string{"run", "test", "vet", "build", "doc"}, words[1]):
			some = true
		default:
			return false
		}
	}
	return some
}

// run runs a command and returns what it wrote if it fails.
func run(name string, args ...string) error {
	var out bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out.String())
	}
	return nil
}
