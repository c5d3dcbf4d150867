#!/usr/bin/perl
# Documents for the quickstart: turns files (plain text, manual pages, perl's pod; gzip or not) into UTF-8 text files of a few kilobytes, one document each.
# Needs nothing but perl-base and gzip, which every Debian and Ubuntu has. What it left out, and why, it says.
#
#   plain_text.pl OUT_DIR [--most BYTES] [--prose] PATH...     a directory stands for the files in it; -: paths from standard input, one a line
#
# --prose: of long paragraphs only those made of words are kept, and each only where it occurs first (licence texts and copyright files repeat each
# other and list files; a text that is held out should not be in what is learnt, too).
use strict;
use warnings;

my ($most, $prose, @paths, $out) = (24e6, 0);
while (@ARGV) {
    my $a = shift;
    if    ($a eq '--most') { $most = shift }
    elsif ($a eq '--prose') { $prose = 1 }
    elsif (!defined $out)  { $out = $a }
    else                   { push @paths, $a }
}
die "usage: plain_text.pl OUT_DIR [--most BYTES] [--prose] PATH...\n" if !@paths;

my $piece = 12000;           # longer texts are cut at a paragraph: a held-out share of the documents must mean something for one long file, too
my (%left_out, %latin1, %seen_file, %seen_paragraph);
my ($files, $documents, $bytes, $full) = (0, 0, 0, 0);

sub leave_out { my ($why, $path) = @_; push @{$left_out{$why}}, $path; return }

# ---- reading: bytes to text ----

sub read_bytes {
    my ($path) = @_;
    local $/;
    my $f;
    if ($path =~ /\.gz$/) { open $f, '-|', 'gzip', '-dcq', '--', $path or return leave_out("unreadable ($!)", $path) }
    else                  { open $f, '<', $path or return leave_out("unreadable ($!)", $path) }
    binmode $f;
    my $text = <$f>;
    close $f or return leave_out('not a whole gzip file', $path);
    return $text;
}

# UTF-8 (checked), UTF-16 with its mark, else Latin-1 if it looks like text at all. Returns UTF-8 bytes.
sub decode {
    my ($text, $path) = @_;
    if ($text =~ /^(?:\xff\xfe|\xfe\xff)/) {
        my @units = unpack $text =~ /^\xff/ ? 'v*' : 'n*', $text;
        shift @units;
        my $s = '';
        while (@units) {
            my $u = shift @units;
            $u = 0x10000 + (($u - 0xd800) << 10) + (shift(@units) - 0xdc00) if $u >= 0xd800 && $u < 0xdc00 && @units && $units[0] >= 0xdc00 && $units[0] < 0xe000;
            $u = 0xfffd if $u >= 0xd800 && $u < 0xe000;
            $s .= chr $u;
        }
        utf8::encode($s);
        return $s;
    }
    return leave_out('not text (NUL bytes)', $path) if $text =~ /\0/;
    $text =~ s/^\xef\xbb\xbf//;
    my $valid = $text =~ /^(?:[\x00-\x7f]++|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})*+\z/;
    return $text if $valid;
    my $controls = () = $text =~ /[\x01-\x08\x0e-\x1f]/g;
    return leave_out('not text (control characters)', $path) if $controls > length($text) / 200;
    $latin1{$path} = 1;
    utf8::upgrade($text);
    utf8::encode($text);
    return $text;
}

# ---- formats ----

my %glyph = (aq => "'", dq => '"', lq => '"', rq => '"', oq => "'", cq => "'", en => '-', em => '--', hy => '-', bu => '*', co => '(c)', rs => '\\', ha => '^', ti => '~',
             '->' => '->', '<-' => '<-', '<=' => '<=', '>=' => '>=', '!=' => '!=', mu => 'x', '+-' => '+-', ga => '`', sq => '', de => ' degrees', lh => '', '*m' => 'u', Fo => '"', Fc => '"');

sub unescape {
    my ($s) = @_;
    $s =~ s/\\".*//;
    $s =~ s/\\f(?:\[[^]]*\]|\(..|.)//g;
    $s =~ s/\\\((..)/exists $glyph{$1} ? $glyph{$1} : ''/ge;
    $s =~ s/\\\[([^]]*)\]/exists $glyph{$1} ? $glyph{$1} : ''/ge;
    $s =~ s/\\\*(?:\(([A-Za-z]{2})|\[(\w+)\]|.)/my $n = lc($1 || $2 || ''); exists $glyph{$n} ? $glyph{$n} : ''/ge;
    $s =~ s/\\s(?:[-+]?\d|\[[^]]*\])|\\[hvwlo]'[^']*'|\\[&%|^c\/,:ud)]//g;
    $s =~ s/\\[ ~0]/ /g;
    $s =~ s/\\-/-/g;
    $s =~ s/\\[e\\]/\\/g;
    $s =~ s/\\(['`"])/$1/g;
    return $s;
}

# The words of a request: "quoted ones" are one.
sub arguments {
    my ($s) = @_;
    my @a;
    push @a, defined $1 ? $1 =~ s/""/"/gr : $2 while $s =~ /\G\s*(?:"((?:[^"]|"")*)"?|(\S(?:\\ |\S)*))/g;
    return map { unescape($_) } @a;
}

# man(7) pages. Lines are filled to paragraphs, except where the page asks for them as they are.
sub from_roff {
    my ($roff) = @_;
    return '' if $roff =~ /^\.so /m || $roff =~ /^\.Dd/m;             # a link to another page; mdoc(7)
    my ($text, $now, $fill, $tag, $skip) = ('', '', 1, 0, '');        # now: the paragraph so far
    my $break = sub { $now =~ s/\s+\z//; $text .= "$now\n\n" if $now ne ''; $now = ''; $tag = 0 };
    my $line  = sub { $now =~ s/ +\z//; $now .= "\n" if $now ne '' };
    my $word  = sub { my ($s) = @_; $s =~ s/\s+\z//; return if $s eq '' && $fill; $now .= $fill && !$tag ? "$s " : "$s\n"; $tag = 0 };
    $roff =~ s/\\\n//g;
    for (split /\n/, $roff) {
        if ($skip) { $skip = '' if /^\.\s*\Q$skip\E/; next }
        if (/^'/ || /^\.\s*\\"/) { next }
        if (!/^\./) { $_ eq '' && $fill ? $break->() : $word->(unescape($_)); next }
        my ($request, $rest) = /^\.\s*(\S+)\s*(.*)/ or next;
        $rest =~ s/\s*\\".*//;
        if    ($request eq 'TH') { my @a = arguments($rest); $now = lc($a[0] // '') . '(' . ($a[1] // '') . ')'; $break->() }
        elsif ($request eq 'SH' || $request eq 'SS') { $fill = 1; $break->(); $now = join ' ', arguments($rest); $break->() }
        elsif ($request =~ /^(?:B|I|SM|R|SB)$/) { $word->(join ' ', arguments($rest)) if $rest ne '' }
        elsif ($request =~ /^(?:BR|RB|BI|IB|IR|RI)$/) { $word->(join '', arguments($rest)) }
        elsif ($request eq 'TP' || $request eq 'TQ') { $break->(); $tag = 1 }
        elsif ($request eq 'IP') { $break->(); my @a = arguments($rest); $now = $a[0] =~ /^[-*o]$/ ? "$a[0] " : "$a[0]\n" if @a && $a[0] ne '' }
        elsif ($request =~ /^(?:PP|P|LP|HP|RS|RE|sp|Sp)$/) { $break->() }
        elsif ($request eq 'br') { $line->() }
        elsif ($request =~ /^(?:nf|EX|Vb|SY)$/) { $line->(); $fill = 0 }
        elsif ($request =~ /^(?:fi|EE|Ve|YS)$/) { $fill = 1; $break->() }
        elsif ($request eq 'UR' || $request eq 'MT') { $word->($rest) }
        elsif ($request eq 'TS') { $skip = 'TE' }
        elsif ($request =~ /^(?:de|de1|ig|am)$/) { $skip = '.' }
    }
    $break->();
    return $text;
}

# The pod of a .pod or .pm file.
sub from_pod {
    my ($source) = @_;
    my ($text, $in, $begin) = ('', 0, 0);
    for my $paragraph (split /\n\s*\n/, $source) {
        $paragraph =~ s/^\n+//;
        if ($paragraph =~ /^=(\w+)\s*(.*)/s) {
            my ($command, $rest) = ($1, $2);
            $in = $command ne 'cut';
            $begin = 1 if $command eq 'begin';
            $begin = 0 if $command eq 'end';
            next if $command !~ /^(?:head\d|item)$/ || $begin;
            $paragraph = $rest;
        } elsif (!$in || $begin) { next }
        elsif ($paragraph !~ /^\s/) { $paragraph =~ s/\s*\n\s*/ /g }
        $paragraph =~ s/L<(?:([^|<>]*)\|)?([^<>]*)>/defined $1 ? $1 : $2 =~ s,^\/,,r/ge;
        $paragraph =~ s/E<(\w+)>/{lt => '<', gt => '>', sol => '\/', verbar => '|'}->{$1} \/\/ ''/ge;
        1 while $paragraph =~ s/[BCFISXZ](?:<< (.*?) >>|<([^<>]*)>)/defined $1 ? $1 : $2/ges;
        $text .= "$paragraph\n\n" if $paragraph =~ /\S/;
    }
    return $text;
}

# ---- text to documents ----

sub tidy {
    my ($text) = @_;
    $text =~ s/\r\n?/\n/g;
    $text =~ s/[\x00-\x08\x0b-\x1f\x7f]//g;
    $text =~ s/[ \t]+$//mg;
    $text =~ s/\n{3,}/\n\n/g;
    $text =~ s/^\n+|\s+\z//g;
    return $text;
}

sub pieces {
    my ($text) = @_;
    return $text if length $text <= 2 * $piece;
    my (@done, $now);
    for my $paragraph (split /\n\n/, $text) {
        # lines, then characters, of what has no paragraphs
        for my $part (length $paragraph > $piece ? $paragraph =~ /\G(.{1,$piece}(?:\n|\z)|.{1,$piece}(?![\x80-\xbf]))/gs : $paragraph) {
            if (defined $now && length($now) + length($part) > $piece) { push @done, $now; $now = undef }
            $now = defined $now ? "$now\n\n$part" : $part;
        }
    }
    return (@done, defined $now ? $now : ());
}

sub is_prose {
    my ($letters, $words) = ($_[0] =~ tr/A-Za-z\x80-\xff //, scalar(() = $_[0] =~ /[^\W\d_]{2,}[.,;:)]?(?=\s|\z)/g));
    return $letters > 0.8 * length $_[0] && $words > 0.09 * length $_[0];
}

sub take_file {
    my ($path) = @_;
    my ($device, $inode) = stat $path or return leave_out("unreadable ($!)", $path);
    return if $seen_file{"$device $inode"}++;
    return leave_out('JSON (corpus.files of a configuration reads JSONL; this wants plain text)', $path) if $path =~ /\.jsonl?(?:\.gz)?$/;
    if ($bytes >= $most) { $full++; return }
    my $text = read_bytes($path);
    return if !defined $text;
    return if $text eq '';
    $text = decode($text, $path);
    return if !defined $text;
    $text = $path =~ /\.[1-9]\w*(?:\.gz)?$/ && $text =~ /^\.(?:TH|so|Dd) /m ? from_roff($text) : $path =~ /\.(?:pod|pm)(?:\.gz)?$/ ? from_pod($text) : $text;
    $text = tidy($text);
    $text = join "\n\n", grep { !/^Files:/ && (length() < 120 || is_prose($_) && !$seen_paragraph{s/\W+//gr}++) } split /\n\n/, $text if $prose;
    return if length $text < 200;
    $files++;
    for my $document (pieces($text)) {
        my $name = sprintf '%s/%06d.txt', $out, $documents++;
        open my $f, '>', $name or die "$name: cannot write: $!\n";
        print $f "$document\n";
        close $f or die "$name: cannot write: $!\n";
        $bytes += length($document) + 1;
    }
}

sub take {
    my ($path, $given) = @_;
    if (-d $path) {
        my ($device, $inode) = stat _;
        return if $seen_file{"$device $inode"}++;                    # a link may lead back up
        opendir my $d, $path or return leave_out("unreadable ($!)", $path);
        take("$path/$_", 0) for sort grep { !/^\./ } readdir $d;
    } elsif (-f $path) { take_file($path) }
    elsif ($given) { die "$path: there is no such file or directory\n" }
}

sub some { my @p = @_; return @p <= 2 ? join ', ', @p : "$p[0], $p[1], ..." }

sub files { return $_[0] == 1 ? '1 file' : "$_[0] files" }

mkdir $out;
for my $path (@paths) { if ($path eq '-') { while (<STDIN>) { chomp; take($_, 0) } } else { take($path, 1) } }
for my $why (sort keys %left_out) { my @p = @{$left_out{$why}}; printf "left out   %s, %s: %s\n", files(scalar @p), $why, some(@p) }
printf "note       %s, not valid UTF-8, read as Latin-1: %s\n", files(scalar keys %latin1), some(sort keys %latin1) if %latin1;
printf "left out   %s, beyond the first %.0f MB of text\n", files($full), $most / 1e6 if $full;
printf "took       %s, %.1f MB of text, as %d documents\n", files($files), $bytes / 1e6, $documents;
